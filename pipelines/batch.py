"""The interface of every pipeline: `LoaderSpec` in, `Loaders` of `Batch`es out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.sources.options import NO_OPTIONS, SplitOptions

Normalize = Literal["imagenet", "unit", "inception", "clip", "dpn"]
Flip = Literal["independent", "shared"]
AutoAugment = Literal["trivial", "rand"]


class Batch(NamedTuple):
    """The samples of one step at every size.

    images: one (N, 3, s, s) tensor per size, the largest first, channels-last in memory, normalised; in
    training, those of `LoaderSpec.extra_sizes` follow, and a size that `LoaderSpec.used` leaves out may be
    (N, 3, 0, 0). labels: (N,) int64. weights: (N,) float32, the samples' weights in the loss, or None if
    all are equal. All are on one device.
    """

    images: tuple[Tensor, ...]
    labels: Tensor
    weights: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        return [*self.images, self.labels, *([] if self.weights is None else [self.weights])]


def copy_batch(batch: Batch) -> Batch:
    """Return a copy in memory of its own."""
    weights = None if batch.weights is None else batch.weights.clone()
    return Batch(tuple(x.clone() for x in batch.images), batch.labels.clone(), weights)


class Loader(Protocol):
    """Batches of one epoch, resumable at any step."""

    sample_weights: NDArray[np.float32] | None
    """What each sample of all ranks weighs in the loss, (samples,); None if all are equal."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        ...

    @property
    def sample_names(self) -> Sequence[str]:
        """Where each sample of all ranks lies, in the order of the evaluation."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` with the next iteration."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the position in it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of `state`. Raises UsageError if it is of other data."""
        ...

    def close(self) -> None:
        """End threads and processes, and free memory."""
        ...


@dataclass(frozen=True)
class LoaderSpec:
    """The options that all pipelines share. `batch_size` is per process.

    node_of_rank: the node of each rank, numbered from 0; () for a single node.
    train_sizes: the sizes of training batches in place of `sizes`, as many (FixRes); () for the same.
    extra_sizes: further sizes of the training crop, after `sizes`, flipped like the largest (for a teacher).
    used: the parts of a size schedule, (first epoch, indices into `sizes`): pipelines may leave the other
    sizes out; () for all.
    """

    data: str | Path
    sizes: tuple[int, ...]
    batch_size: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    normalize: Normalize = "imagenet"
    flip: Flip = "independent"
    auto_augment: AutoAugment | None = None
    ra_magnitude: int = 9
    random_erase: float = 0.0
    repeats: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    node_of_rank: tuple[int, ...] = ()
    splits: SplitOptions = NO_OPTIONS
    class_weights: str | None = None
    balanced_sampling: bool = False
    train_sizes: tuple[int, ...] = ()
    extra_sizes: tuple[int, ...] = ()
    used: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def nodes(self) -> tuple[int, ...]:
        """The node of each rank."""
        return self.node_of_rank or (0,) * self.world_size

    @property
    def local_ranks(self) -> list[int]:
        """The ranks on this rank's node."""
        return [rank for rank, node in enumerate(self.nodes) if node == self.nodes[self.rank]]

    @property
    def all_sizes(self) -> tuple[int, ...]:
        """The sizes of a batch's images, in their order."""
        return self.sizes + self.extra_sizes

    def sizes_in(self, epoch: int) -> tuple[int, ...]:
        """Return `all_sizes`, with 0 for those that an epoch does not use."""
        if not self.used:
            return self.all_sizes
        _, places = max(part for part in self.used if part[0] <= epoch)
        used = (size if i in places else 0 for i, size in enumerate(self.sizes))
        return (*used, *self.extra_sizes)

    def of_split(self, training: bool) -> LoaderSpec:
        """Return the options of the training or of the validation data."""
        if training:
            return replace(self, sizes=self.train_sizes or self.sizes)
        return replace(self, extra_sizes=(), used=())


class Loaders(NamedTuple):
    """Training and validation data; `train` is None for an evaluation."""

    train: Loader | None
    val: Loader
    classes: list[str]

    def close(self) -> None:
        """Close both."""
        for loader in (self.train, self.val):
            if loader is not None:
                loader.close()

"""What every pipeline agrees on: `Batch`, `Loader`, normalisation, crop and evaluation geometry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Normalize = Literal["imagenet", "unit"]
Flip = Literal["independent", "shared"]
AutoAugment = Literal["trivial", "rand"]


class Batch(NamedTuple):
    """One step's samples at every size.

    images: one (N, 3, s, s) tensor per size, the largest first, channels-last in memory, normalised.
    labels: (N,) int64. All on one device.
    """

    images: tuple[Tensor, ...]
    labels: Tensor


class Loader(Protocol):
    """Batches of one epoch, resumable at any step."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int:
        """Steps in an epoch."""
        ...

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class LoaderSpec:
    """What a backend is told, whatever it reads from. `batch_size` is per process."""

    data: Path
    sizes: tuple[int, ...]
    batch_size: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    normalize: Normalize = "imagenet"
    flip: Flip = "independent"
    auto_augment: AutoAugment | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1


class Loaders(NamedTuple):
    """`train` is None where only an evaluation was asked for."""

    train: Loader | None
    val: Loader
    classes: list[str]

    def close(self) -> None:
        """Close both."""
        for loader in (self.train, self.val):
            if loader is not None:
                loader.close()

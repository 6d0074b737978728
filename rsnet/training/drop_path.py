"""The draws of stochastic depth: counters, as those of crops, and one draw for all sizes of a sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.sampler import uniforms
from rsnet.models.layers.drop_path import DropPath

DROP_PATH_LANE = 4096  # behind the random numbers of the loader


class DropPathSampler:
    """Sets the factors of the `DropPath`s of a network, before each batch of a training.

    A sample skips the same branches at all sizes. So the sizes, which teach each other, differ in
    resolution only, not in the branches drawn, just as they see one crop. All that is drawn depends on the
    seed, the update, and the place of the sample in the update; a run goes on exactly, also on another
    number of processes.
    """

    def __init__(self, model: nn.Module, batch_size: int, seed: int, rank: int, ranks: int) -> None:
        """Take the `DropPath`s of `model`. ranks: processes with `batch_size` images each in a batch."""
        self._layers = [m for m in model.modules() if isinstance(m, DropPath)]
        self._rates = np.array([layer.rate for layer in self._layers])
        self._batch_size, self._seed, self._rank, self._ranks = batch_size, seed, rank, ranks
        self._factors: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self._rates.any())

    def draw(self, step: int, batch: int, device: torch.device) -> None:
        """Draw for the batch of this number, from 0, of optimizer step `step`. Does not synchronise."""
        first = (batch * self._ranks + self._rank) * self._batch_size
        places = np.arange(first, first + self._batch_size)
        numbers = uniforms(self._seed, step, places, len(self._layers), DROP_PATH_LANE)
        factors = torch.from_numpy(((numbers >= self._rates) / (1 - self._rates)).T).float()
        if device.type == "cuda":
            factors = factors.pin_memory()  # a copy from pageable memory would not be asynchronous
        if self._factors is None:
            # In place from now on: CUDA graphs and compiled code read it where it is.
            self._factors = torch.empty_like(factors, device=device)
            for layer, own in zip(self._layers, self._factors.unbind(), strict=True):
                layer.factors = own
        self._factors.copy_(factors, non_blocking=True)

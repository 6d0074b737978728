"""BatchNorm's running statistics, as they were before an update that is left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningStatistics:
    """Keeps a copy of a network's statistics, and puts it back, on the device and in few kernels.

    A batch with a loss that is not finite has passed through BatchNorm, whose means it made NaN for good.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        self._copy: Tensor | None = None

    @torch.no_grad()
    def keep(self) -> None:
        """Before an update."""
        self._copy = torch.cat([b.flatten() for b in self._buffers])

    @torch.no_grad()
    def put_back_if(self, is_bad: Tensor) -> None:
        """After it: () bool on the device."""
        assert self._copy is not None
        now = torch.cat([b.flatten() for b in self._buffers])
        chosen = torch.split(
            torch.where(is_bad, self._copy, now), [b.numel() for b in self._buffers]
        )
        parts = [part.view_as(b) for part, b in zip(chosen, self._buffers, strict=True)]
        torch._foreach_copy_(self._buffers, parts)

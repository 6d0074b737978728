"""Running means of the losses, on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rsnet.distributed import process_group as distributed


class LossMeter:
    """Running means of named losses over the steps, since the last `compute`, in which they are finite."""

    def __init__(self) -> None:
        # By the names of a step's terms: one tensor, (2, terms) of sums and counts, whichever terms it has.
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, terms: dict[str, Tensor]) -> None:
        values = torch.stack([v.detach() for v in terms.values()])
        finite = values.isfinite()
        both = torch.stack([values.where(finite, 0.0), finite.to(values.dtype)])
        names = tuple(terms)
        self._sums[names] = self._sums[names] + both if names in self._sums else both

    def compute(self) -> dict[str, float]:
        """Return the means over steps and ranks, NaN where there is none, and reset. Synchronises."""
        totals: dict[str, tuple[float, float]] = {}
        for names, both in self._sums.items():
            for name, total, count in zip(
                names, *distributed.all_reduce_sum(both).tolist(), strict=True
            ):
                before = totals.get(name, (0.0, 0.0))
                totals[name] = before[0] + total, before[1] + count
        self._sums.clear()
        return {name: total / n if n else math.nan for name, (total, n) in totals.items()}

    def state(self) -> list[tuple[list[str], Tensor]]:
        """Return what was added on this rank since the last `compute`."""
        return [(list(names), both.cpu()) for names, both in self._sums.items()]

    def load(self, state: list[tuple[list[str], Tensor]], device: torch.device) -> None:
        self._sums = {tuple(names): both.to(device) for names, both in state}

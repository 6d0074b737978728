"""Counters that live on the device. Reading one is a host synchronisation, adding to it is none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rsnet.distributed import process_group as distributed
from rsnet.losses import ensemble_logits

ENSEMBLE = "ensemble"


class TermMeans:
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
        """The means over steps and ranks, NaN where there is none; starts anew. Synchronises."""
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
        """What was added on this rank since the last `compute`."""
        return [(list(names), both.cpu()) for names, both in self._sums.items()]

    def load(self, state: list[tuple[list[str], Tensor]], device: torch.device) -> None:
        self._sums = {tuple(names): both.to(device) for names, both in state}


class FiniteGuard:
    """Keeps updates with a loss that is not finite from the weights; on the device.

    most: how many such updates in a row are left out; one more, and no update is done any longer.
    """

    def __init__(self, device: torch.device, most: int = 0) -> None:
        self._most = most
        self._tripped_at = torch.full((), -1, dtype=torch.int64, device=device)
        self.is_bad = torch.zeros((), dtype=torch.bool, device=device)  # this update, so far
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        # By the names of a step's terms, which need not be the same in every step: whether each was
        # not finite in one of the updates that were left out.
        self._bad: dict[tuple[str, ...], Tensor] = {}

    def check(self, terms: dict[str, Tensor]) -> Tensor:
        """() float32: 1 if this update is to be left out, on all ranks, else 0."""
        bad = ~torch.isfinite(torch.stack([v.detach() for v in terms.values()]))
        bad = distributed.all_reduce_max(bad.to(torch.float32)) > 0
        names = tuple(terms)
        is_running = self._tripped_at < 0
        self._bad[names] = self._bad.get(names, torch.zeros_like(bad)) | (is_running & bad)
        self.is_bad = self.is_bad | bad.any()
        return (self.is_bad | ~is_running).to(torch.float32)

    def close(self, step: int) -> None:
        """Update `step` is done, or was left out."""
        self._in_a_row = torch.where(self.is_bad, self._in_a_row + 1, 0)
        trips = (self._tripped_at < 0) & (self._in_a_row > self._most)
        self._tripped_at = torch.where(trips, step, self._tripped_at)
        self._skipped = self._skipped + self.is_bad
        self.is_bad = torch.zeros_like(self.is_bad)

    def state(self) -> list[int]:
        """Updates that were left out: in a row, and in all. Synchronises."""
        return [int(self._in_a_row.item()), self.skipped()]

    def load(self, state: Sequence[int]) -> None:
        self._in_a_row.fill_(state[0])
        self._skipped.fill_(state[1])

    def skipped(self) -> int:
        """Updates that were left out so far. Synchronises."""
        return int(self._skipped.item())

    def verdict(self) -> tuple[int, list[str]] | None:
        """The step that was one too many and the terms, or None. Synchronises."""
        step = int(self._tripped_at.item())
        if step < 0:
            return None
        return step, [
            name
            for names, flags in self._bad.items()
            for name, bad in zip(names, flags.tolist(), strict=True)
            if bad
        ]


class Accuracy:
    """Exact top-1, top-5 and mean cross-entropy, at every size and of the ensemble."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.names = [*map(str, sizes), ENSEMBLE]
        # Counts of samples, right in one, right in five; int64, as float32 stops counting at 2^24.
        self._hits = torch.zeros(len(self.names), 2, dtype=torch.int64, device=device)
        self._loss = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self._samples = 0

    def add(self, logits: Sequence[Tensor], labels: Tensor, alpha: Tensor) -> None:
        """S x (N, C), (N,), (S,)."""
        for row, z in enumerate([*logits, ensemble_logits(logits, alpha)]):
            z = z.float()
            top = z.topk(min(5, z.shape[1]), dim=1).indices == labels[:, None]
            self._hits[row, 0] += top[:, 0].sum()
            self._hits[row, 1] += top.sum()
            self._loss[row] += F.cross_entropy(z, labels, reduction="sum")
        self._samples += len(labels)

    def compute(self) -> dict[str, dict[str, float]]:
        """{"224": {"top1": %, "top5": %, "loss": mean}, ..., "ensemble": ...}, over all ranks.

        Synchronises.
        """
        samples = torch.tensor(self._samples, dtype=torch.int64, device=self._hits.device)
        n = int(distributed.all_reduce_sum(samples).item())
        hits = (100.0 * distributed.all_reduce_sum(self._hits).double() / n).tolist()
        loss = (distributed.all_reduce_sum(self._loss) / n).tolist()
        return {
            name: {"top1": one, "top5": five, "loss": mean}
            for name, (one, five), mean in zip(self.names, hits, loss, strict=True)
        }

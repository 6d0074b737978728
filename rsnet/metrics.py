"""Counters that live on the device. Reading one is a host synchronisation, adding to it is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rsnet import distributed
from rsnet.losses import ensemble_logits

ENSEMBLE = "ensemble"


class TermMeans:
    """Running means of named losses over the steps, since the last `compute`, that have them."""

    def __init__(self) -> None:
        # By the names of a step's terms: one kernel a step, whichever terms it has.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._steps: Counter[tuple[str, ...]] = Counter()

    def add(self, terms: dict[str, Tensor]) -> None:
        values = torch.stack([v.detach() for v in terms.values()])
        names = tuple(terms)
        self._sums[names] = self._sums[names] + values if names in self._sums else values
        self._steps[names] += 1

    def compute(self) -> dict[str, float]:
        """The means over steps and ranks; starts anew. Synchronises."""
        sums: dict[str, float] = {}
        steps: Counter[str] = Counter()
        for names, values in self._sums.items():
            mean = distributed.all_reduce_sum(values) / distributed.world_size()
            for name, value in zip(names, mean.tolist(), strict=True):
                sums[name] = sums.get(name, 0.0) + value
                steps[name] += self._steps[names]
        self._sums.clear()
        self._steps.clear()
        return {name: value / steps[name] for name, value in sums.items()}


class FiniteGuard:
    """Remembers the first step whose loss is not finite, and which terms; on the device.

    From that step on `tripped` is 1, which keeps the optimizer from any update.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        # By the names of a step's terms, which need not be the same in every step: whether each was
        # not finite in the first bad step, which sets one of these tensors alone.
        self._bad: dict[tuple[str, ...], Tensor] = {}

    def check(self, terms: dict[str, Tensor], step: int) -> Tensor:
        """() float32: 1 if this step or an earlier one was not finite, on any rank, else 0."""
        bad = ~torch.isfinite(torch.stack([v.detach() for v in terms.values()]))
        bad = distributed.all_reduce_max(bad.to(torch.float32)) > 0
        names = tuple(terms)
        news = (self._first < 0) & bad.any()
        self._bad[names] = self._bad.get(names, torch.zeros_like(bad)) | (news & bad)
        self._first = torch.where(news, step, self._first)
        return (self._first >= 0).to(torch.float32)

    def verdict(self) -> tuple[int, list[str]] | None:
        """The first step that was not finite and its terms, or None. Synchronises."""
        step = int(self._first.item())
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

"""Updates with a loss or gradient that is not finite: kept from weights and BatchNorm's statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rsnet.distributed import process_group as distributed

GRADIENTS = ("a gradient",)  # beside the names of losses


class BatchNormBackup:
    """Saves and restores BatchNorm's running statistics, on the device and in few kernels. A batch with a
    non-finite loss has already passed through BatchNorm and may have made its running mean NaN for good.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        self._copy: Tensor | None = None

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the statistics, before an update."""
        self._copy = torch.cat([b.flatten() for b in self._buffers])

    @torch.no_grad()
    def put_back_if(self, is_bad: Tensor) -> None:
        """Put the copy back, after the update, if `is_bad`, a () bool on the device."""
        assert self._copy is not None
        now = torch.cat([b.flatten() for b in self._buffers])
        chosen = torch.split(
            torch.where(is_bad, self._copy, now), [b.numel() for b in self._buffers]
        )
        parts = [part.view_as(b) for part, b in zip(chosen, self._buffers, strict=True)]
        torch._foreach_copy_(self._buffers, parts)


class FiniteGuard:
    """Keeps updates with a loss or gradient that is not finite from the weights; on the device, and in place.

    most: consecutive updates that may be skipped; after one more, no further update is done.
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
        self._here: dict[
            tuple[str, ...], Tensor
        ] = {}  # the same of this update's batches on this rank

    def check(self, terms: dict[str, Tensor], last: bool = True) -> Tensor:
        """Return a () float32: 1 if this update is to be left out, else 0; on all ranks alike if it is the
        last of an update's batches, so that ranks wait for each other once.
        """
        bad = ~torch.isfinite(torch.stack([v.detach() for v in terms.values()]))
        names = tuple(terms)
        if names not in self._bad:
            self._bad[names], self._here[names] = torch.zeros_like(bad), torch.zeros_like(bad)
        here = self._here[names]
        here |= bad
        if not last:
            return (here.any() | (self._tripped_at >= 0)).to(torch.float32)
        bad = distributed.all_reduce_max(here.to(torch.float32)) > 0
        here.zero_()
        self._bad[names] |= (self._tripped_at < 0) & bad
        self.is_bad |= bad.any()
        return self._left_out()

    def check_gradients(self, norm: Tensor) -> Tensor:
        """Return what `check` does, now that the norm of all gradients is known, which all ranks have alike.

        A backward may make NaN of a finite loss: of a square root at 0, or by an overflow.
        """
        bad = ~torch.isfinite(norm)
        if GRADIENTS not in self._bad:
            self._bad[GRADIENTS] = torch.zeros_like(bad[None])
        # Of a loss that is not finite the gradients are not either.
        self._bad[GRADIENTS] |= (self._tripped_at < 0) & bad & ~self.is_bad
        self.is_bad |= bad
        return self._left_out()

    def _left_out(self) -> Tensor:
        return (self.is_bad | (self._tripped_at >= 0)).to(torch.float32)

    def close(self, step: int | Tensor) -> None:
        """Count update `step`, an int or () int64, which was done, or left out."""
        self._in_a_row.add_(1).mul_(self.is_bad)
        trips = (self._tripped_at < 0) & (self._in_a_row > self._most)
        self._tripped_at.copy_(torch.where(trips, step, self._tripped_at))
        self._skipped.add_(self.is_bad)
        for flags in self._bad.values():  # of updates in a row, up to the one that was too many
            flags &= self.is_bad | (self._tripped_at >= 0)
        self.is_bad.zero_()

    def state(self) -> list[int]:
        """Return the updates that were left out: in a row, and in all. Synchronises."""
        return [int(self._in_a_row.item()), self.skipped()]

    def load(self, state: Sequence[int]) -> None:
        """Take over what `state` returned."""
        self._in_a_row.fill_(state[0])
        self._skipped.fill_(state[1])

    def skipped(self) -> int:
        """Return the updates that were left out so far. Synchronises."""
        return int(self._skipped.item())

    def verdict(self) -> tuple[int, list[str]] | None:
        """Return the step that exceeded the limit and the non-finite terms, or None. Synchronises."""
        step = int(self._tripped_at.item())
        if step < 0:
            return None
        return step, [
            name
            for names, flags in self._bad.items()
            for name, bad in zip(names, flags.tolist(), strict=True)
            if bad
        ]

"""The bases of learned quantizers follow what they quantize: once an update, after its last backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from rsnet.distributed import process_group as distributed
from rsnet.models.quantization.lq_nets import (
    ActivationQuantizer,
    Quantizer,
    WeightQuantizer,
    level_table,
)
from rsnet.models.switchable import ResolutionSwitchable

DECAY = 0.9
RIDGE = 1e-4  # pull towards the present basis, which decides where the codes that occur do not


class BasisUpdater:
    """The bases of all quantizers of a network (Zhang et al. 2018, section 3.3).

    Every resolution of an update moves a basis once, the largest first, by the least-squares solution for
    its codes. The original, too, reads a basis for five forwards and then moves it five times, in no certain
    order, by what its first GPU saw. Here all batches of an update count, on all ranks, so that neither
    their number nor recomputation changes anything. The weights are the same on all ranks.
    """

    def __init__(self, model: ResolutionSwitchable) -> None:
        self._sizes = model.sizes
        self._weights = [m for m in model.modules() if isinstance(m, WeightQuantizer)]
        self._activations = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]

    @torch.no_grad()
    def update(self, sizes: Sequence[int] | None) -> None:
        """After the backward of an update's last batch. Does not synchronise.

        sizes: those that took part, None for all.
        """
        present = [i for i, size in enumerate(self._sizes) if sizes is None or size in sizes]
        if self._weights:
            statistics = torch.cat([q.statistics.pop(0) for q in self._weights])
            update_bases(self._weights, [statistics] * len(present))
        if self._activations:
            if self._activations[0].of_largest:
                present = present[:1]
            counted = [[q.statistics.pop(i) for q in self._activations] for i in present]
            everywhere = distributed.all_reduce_sum(torch.stack([torch.cat(c) for c in counted]))
            update_bases(self._activations, list(everywhere))


def solve_basis(basis: Tensor, codes: Tensor, statistics: Tensor) -> Tensor:
    """The basis (C, K) that is nearest to values with these codes in the least squares, drawn to `basis`.

    codes: (C, L, K), statistics: (C, 2, L), how many values have each code, and their sum.

    (B^T B + e I)^-1 (B^T x + e v). What no code determines stays exactly as it is, because empty levels
    count exactly 0.
    """
    number, total = statistics.unbind(1)
    weighted = codes * number[..., None]
    squares = codes.transpose(1, 2) @ weighted
    products = (codes * total[..., None]).sum(1)
    ridge = RIDGE * torch.eye(codes.shape[2], dtype=squares.dtype, device=squares.device)
    return cast(Tensor, torch.linalg.solve_ex(squares + ridge, products + RIDGE * basis)[0])


def update_bases(quantizers: Sequence[Quantizer], statistics: Sequence[Tensor]) -> None:
    """Move the bases once for each of `statistics`, (C, 2, L), whose rows are those of all quantizers."""
    rows = [len(q.basis) for q in quantizers]
    basis, total = (
        torch.cat([getattr(q, n) for q in quantizers]).double() for n in ("basis", "total")
    )
    _, _, codes = level_table(basis, quantizers[0].codes.double())
    rest = quantizers[0].rest.double()
    for counted in statistics:
        total = DECAY * total + (1 - DECAY) * solve_basis(basis, codes, counted)
        rest = DECAY * rest
        basis = total / (1 - rest)
    for name, values in (("basis", basis), ("total", total)):
        parts = torch.split(values.to(quantizers[0].basis.dtype), rows)
        torch._foreach_copy_([getattr(q, name) for q in quantizers], list(parts))
    for quantizer in quantizers:
        quantizer.rest.copy_(rest)

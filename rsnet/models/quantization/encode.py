"""Rounding of LQ-Nets' quantizers: levels, the thresholds between them, and the level of every value.

Everything that depends on the thresholds is here, and as compiled code in `encode_numba` (CPU) and
`encode_triton` (GPU).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

COMPILED = (torch.float32, torch.bfloat16)  # on a CPU

# Thresholds that values are compared with together: all of 2 bits; of 8 bits it would take 256 times the
# memory of the values.
AT_ONCE = 4


def code_table(bits: int, lowest: float) -> Tensor:
    """Return the codes, (2^K, K), in the order of the binary numbers: 1 where a bit is set, else `lowest`."""
    ones = (torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1
    return torch.where(ones > 0, 1.0, lowest)


@torch.no_grad()
def level_table(basis: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return thresholds and levels of bases (C, K), (C, L) each, ascending, and the levels' codes, (C, L, K).

    codes: (L, K), of {-1, 1} or {0, 1}; the latter have 0 as their first level, whatever the basis. A
    threshold lies in the middle between two levels; the first one is -inf.
    """
    levels, order = (basis[:, None] * codes).sum(2).sort(dim=1)
    thresholds = F.pad((levels[:, 1:] + levels[:, :-1]) / 2, (1, 0), value=-torch.inf)
    ranked = codes[order]
    # The original puts what lies below the first threshold at 0 after it has sorted; with a negative entry in
    # the basis the lowest level would be another.
    is_signed = codes[0, 0] < 0
    levels[:, 0] = torch.where(is_signed, levels[:, 0], 0)
    ranked[:, 0] = torch.where(is_signed, ranked[:, 0], 0)
    return thresholds, levels, ranked


def level_indices(rows: Tensor, thresholds: Tensor) -> Tensor:
    """Return the index of each value's level, (C, n), by the last of the thresholds, (C, L), below it."""
    return torch.searchsorted(thresholds[:, 1:].contiguous(), rows.float())


def encode(
    values: Tensor, thresholds: Tensor, levels: Tensor, counting: bool
) -> tuple[Tensor, Tensor | None]:
    """Replace every value by the level of its interval.

    values: C rows along the first dimension, each with a table of its own, or any shape if C is 1.
    thresholds: (C, L), ascending, levels: (C, L), both float32, see `level_table`. A value gets the level of
    the last threshold that lies below it; NaN and -inf stay, so that a loss shows them.

    Returns them in values' dtype and memory layout, and, if `counting`, (C, 2, L) float64: how many values
    are at each level, and their sum. Empty levels have exactly 0 of both.
    """
    count = len(levels)
    values = _dense(values, count)
    coded = torch.empty_like(values)
    if values.device.type == "meta":
        return coded, None
    rows, coded_rows = _rows(values, count), _rows(coded, count)
    above: Tensor | None
    if _is_compiled(values):
        above = _kernels().encode(rows, thresholds, levels, coded_rows)
    elif _is_on_gpu(values):
        above = _gpu_kernels().encode(rows, thresholds, levels, coded_rows, counting)
    else:
        chosen = levels.gather(1, level_indices(rows, thresholds))
        coded_rows.copy_(chosen.where(rows > -torch.inf, rows))
        above = _above(rows, thresholds) if counting else None
    if above is None or not counting:
        return coded, None
    return coded, above - F.pad(above[..., 1:], (0, 1))


def clipped_ste_backward(gradient: Tensor, values: Tensor, top: Tensor) -> Tensor:
    """Return `gradient` where `values`, of the same shape, are at most `top`, (1,) float32; 0 elsewhere."""
    values = _dense(values, 1)
    if (
        _is_compiled(values)
        and gradient.dtype == values.dtype
        and gradient.stride() == values.stride()
    ):
        kept = torch.empty_like(values)
        _kernels().clipped_ste_backward(_rows(gradient, 1), _rows(values, 1), top, _rows(kept, 1))
        return kept
    return torch.where(values <= top, gradient, 0.0)


def _above(rows: Tensor, thresholds: Tensor) -> Tensor:
    """Return how many of each row lie above each threshold, and their sum: (C, 2, L) float64."""
    parts = []
    for some in torch.split(thresholds, AT_ONCE, dim=1):
        above = rows[:, None] > some[..., None]
        number = above.sum(2, dtype=torch.float64)
        total = torch.where(above, rows[:, None], 0.0).sum(2, dtype=torch.float64)
        parts.append(torch.stack((number, total), 1))
    return torch.cat(parts, 2)


def _is_compiled(values: Tensor) -> bool:
    return (
        values.device.type == "cpu"
        and values.dtype in COMPILED
        and values.numel() > 0
        and not torch.compiler.is_compiling()
        and _kernels() is not None
    )


def _is_on_gpu(values: Tensor) -> bool:
    return (
        values.device.type == "cuda"
        and values.dtype in (*COMPILED, torch.float16)
        and values.numel() > 0
        and not torch.compiler.is_compiling()
        and _gpu_kernels() is not None
    )


@functools.cache
def _gpu_kernels() -> Any:
    """Return `encode_triton`, or None where torch came without Triton. Importing it takes half a second."""
    try:
        from rsnet.models.quantization import encode_triton
    except ImportError:
        return None
    return encode_triton


@functools.cache
def _kernels() -> Any:
    """Return `encode_numba`, or None without numba, which a released network does not need.

    Importing it takes half a second.
    """
    try:
        from rsnet.models.quantization import encode_numba
    except ImportError:
        return None
    return encode_numba


def _dense(values: Tensor, count: int) -> Tensor:
    """Return the values without gaps in memory and, if `count` > 1, one row of the first dimension after
    the other."""
    is_dense = values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last)
    is_outermost = count == 1 or values.stride(0) * count == values.numel()
    return values if is_dense and is_outermost else values.contiguous()


def _rows(values: Tensor, count: int) -> Tensor:
    """Return a view, (count, n), in the order of the memory."""
    length = values.numel() // count
    return values.as_strided((count, length), (length, 1))

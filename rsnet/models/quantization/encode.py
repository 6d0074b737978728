"""Values as levels: which one each gets, how many get it, and what they add up to."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

COMPILED = (torch.float32, torch.bfloat16)  # on a CPU

# Thresholds that values are compared with together: all of 2 bits; of 8 bits it would take 256 times the
# memory of the values.
AT_ONCE = 4


def encode(
    values: Tensor, thresholds: Tensor, levels: Tensor, counting: bool
) -> tuple[Tensor, Tensor | None]:
    """Replace every value by the level of its interval.

    values: C rows along the first dimension, each with a table of its own, or any shape if C is 1.
    thresholds: (C, L), ascending, levels: (C, L), both float32. The first threshold is -inf; a value gets
    the level of the last threshold that lies below it; NaN and -inf stay, so that a loss shows them.

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
    else:
        numbers = torch.searchsorted(thresholds[:, 1:].contiguous(), rows.float())
        coded_rows.copy_(levels.gather(1, numbers).where(rows > -torch.inf, rows))
        above = _above(rows, thresholds) if counting else None
    if above is None or not counting:
        return coded, None
    return coded, above - torch.nn.functional.pad(above[..., 1:], (0, 1))


def clipped_ste_backward(gradient: Tensor, values: Tensor, top: Tensor) -> Tensor:
    """`gradient` where `values`, of the same shape, are at most `top`, (1,) float32; 0 elsewhere."""
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
    """How many of each row lie above each threshold, and their sum: (C, 2, L) float64."""
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


@functools.cache
def _kernels() -> Any:
    """The compiled ones, or None without numba, which a released network is used without. Importing it takes
    half a second."""
    try:
        from rsnet.models.quantization import encode_numba as levels_cpu
    except ImportError:
        return None
    return levels_cpu


def _dense(values: Tensor, count: int) -> Tensor:
    """The same values in a row for each of the first dimension, if there are several, without gaps."""
    is_dense = values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last)
    is_outermost = count == 1 or values.stride(0) * count == values.numel()
    return values if is_dense and is_outermost else values.contiguous()


def _rows(values: Tensor, count: int) -> Tensor:
    """(count, n), in the order of the memory."""
    length = values.numel() // count
    return values.as_strided((count, length), (length, 1))

"""Kernels of `rsnet.models.layers.fused_batchnorm`, for NVIDIA GPUs: imported where a tensor is on one.

A channels-last (N, C, h, w) tensor is a matrix of N * h * w rows and C columns. What is summed over rows, is
summed in two stages, in float32, without atomic additions, which would come in any order. Tiles are 8 KB in
half precision; they were not tuned on a GPU. Triton's compiler refuses annotations that are not its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

Norm = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, bias, mean, rstd, each (C,) float32

TILE = 4096  # values that a program holds at once
PROGRAMS = 1024  # of a first stage: about eight for each multiprocessor of an H100
# Set explicitly: Triton 3.9 warns that its default will change, which would change results.
FUSION = {"enable_fp_fusion": True}
ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}


@triton.jit
def _statistics(  # noqa: PLR0917 - a kernel takes no others
    x, means, squares, rows, channels, part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Means and sums of squared deviations of `part` rows: as Chan et al. 1979 combine them, tile by tile."""
    split = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.minimum((split + 1) * part, rows)
    count = 0.0
    mean = tl.zeros((COLUMNS,), tl.float32)
    square = tl.zeros((COLUMNS,), tl.float32)
    for start in range(split * part, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < channels)[None, :]
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        new = tl.minimum(end - start, ROWS).to(tl.float32)
        tile_mean = tl.sum(value, 0) / new
        deviation = tl.where(inside, value - tile_mean[None, :], 0.0)
        apart = tile_mean - mean
        square += tl.sum(deviation * deviation, 0) + apart * apart * (count * new / (count + new))
        mean += apart * (new / (count + new))
        count += new
    at = split * channels + column
    tl.store(means + at, mean, mask=column < channels)
    tl.store(squares + at, square, mask=column < channels)


@triton.jit
def _combine_statistics(  # noqa: PLR0917
    means, squares, mean, rstd, running_mean, running_var, rows, channels, part, splits, momentum, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < channels
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, splits, ROWS):
        split = start + tl.arange(0, ROWS)
        inside = (split < splits)[:, None] & known[None, :]
        at = split[:, None] * channels + column[None, :]
        count = tl.minimum(part, rows - split * part).to(tl.float32)
        total += tl.sum(tl.load(means + at, mask=inside, other=0.0) * count[:, None], 0)
    center = total / rows
    square = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, splits, ROWS):
        split = start + tl.arange(0, ROWS)
        inside = (split < splits)[:, None] & known[None, :]
        at = split[:, None] * channels + column[None, :]
        count = tl.minimum(part, rows - split * part).to(tl.float32)
        apart = tl.load(means + at, mask=inside, other=0.0) - center[None, :]
        between = tl.where(inside, apart * apart * count[:, None], 0.0)
        square += tl.sum(tl.load(squares + at, mask=inside, other=0.0) + between, 0)
    tl.store(mean + column, center, mask=known)
    tl.store(rstd + column, 1.0 / tl.sqrt_rn(square / rows + eps), mask=known)
    before = tl.load(running_mean + column, mask=known)
    tl.store(running_mean + column, (1 - momentum) * before + momentum * center, mask=known)
    before = tl.load(running_var + column, mask=known)
    unbiased = square / (rows - 1)
    tl.store(running_var + column, (1 - momentum) * before + momentum * unbiased, mask=known)


@triton.jit
def _apply(  # noqa: PLR0917
    x, residual, y, weight, bias, mean, rstd, rows, channels,
    ADDS: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < channels
    inside = (row < rows)[:, None] & known[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    scale = tl.load(weight + column, mask=known) * tl.load(rstd + column, mask=known)
    center = tl.load(mean + column, mask=known)
    shift = tl.load(bias + column, mask=known)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value = (value - center[None, :]) * scale[None, :] + shift[None, :]
    if ADDS:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    # As comparisons, so that NaN stays.
    if ACTIVATION > 0:
        value = tl.where(value < 0.0, 0.0, value)
    if ACTIVATION > 1:
        value = tl.where(value > 6.0, 6.0, value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(  # noqa: PLR0917
    grad_y, y, at, inside, value,
    READS_Y: tl.constexpr, ACTIVATION: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """The gradient before the activation. value: what it was computed of, if it is not seen in its output."""
    gradient = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
    if READS_Y:
        value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION > 0:
        gradient = tl.where(value <= 0.0, 0.0, gradient)
    if ACTIVATION > 1:
        gradient = tl.where(value >= 6.0, 0.0, gradient)
    return gradient


@triton.jit
def _backward_sums(  # noqa: PLR0917
    grad_y, x, y, weight, bias, mean, rstd, sums,
    rows, channels, part,
    READS_Y: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    split = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < channels
    scale, shift = tl.load(weight + column, mask=known), tl.load(bias + column, mask=known)
    center, inverse = tl.load(mean + column, mask=known), tl.load(rstd + column, mask=known)
    end = tl.minimum((split + 1) * part, rows)
    grad_bias = tl.zeros((COLUMNS,), tl.float32)
    grad_weight = tl.zeros((COLUMNS,), tl.float32)
    for start in range(split * part, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & known[None, :]
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        deviation = value - center[None, :]
        value = deviation * (scale * inverse)[None, :] + shift[None, :]
        gradient = _gradient(grad_y, y, at, inside, value, READS_Y, ACTIVATION)
        grad_bias += tl.sum(gradient, 0)
        normalized = tl.where(inside, deviation * inverse[None, :], 0.0)
        grad_weight += tl.sum(gradient * normalized, 0)
    at = 2 * split * channels + column
    tl.store(sums + at, grad_weight, mask=known)
    tl.store(sums + at + channels, grad_bias, mask=known)


@triton.jit
def _backward(  # noqa: PLR0917
    grad_y, x, y, weight, bias, mean, rstd, grad_weight,
    grad_bias, grad_x, grad_residual, rows, channels,
    READS_Y: tl.constexpr, WRITES: tl.constexpr, ACTIVATION: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < channels
    inside = (row < rows)[:, None] & known[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    scale, shift = tl.load(weight + column, mask=known), tl.load(bias + column, mask=known)
    center, inverse = tl.load(mean + column, mask=known), tl.load(rstd + column, mask=known)
    share_of_weight = tl.load(grad_weight + column, mask=known) / rows
    share_of_bias = tl.load(grad_bias + column, mask=known) / rows
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    deviation = value - center[None, :]
    value = deviation * (scale * inverse)[None, :] + shift[None, :]
    gradient = _gradient(grad_y, y, at, inside, value, READS_Y, ACTIVATION)
    if WRITES:
        tl.store(grad_residual + at, gradient.to(grad_residual.dtype.element_ty), mask=inside)
    gradient -= share_of_bias[None, :] + deviation * (inverse * share_of_weight)[None, :]
    result = gradient * (scale * inverse)[None, :]
    tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _add_up(  # noqa: PLR0917
    parts, grad_weight, grad_bias, splits, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < channels
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, splits, ROWS):
        split = start + tl.arange(0, ROWS)
        inside = (split < splits)[:, None] & known[None, :]
        at = (2 * split + tl.program_id(1))[:, None] * channels + column[None, :]
        total += tl.sum(tl.load(parts + at, mask=inside, other=0.0), 0)
    if tl.program_id(1) == 0:
        tl.store(grad_weight + column, total, mask=known)
    else:
        tl.store(grad_bias + column, total, mask=known)


def statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Return mean and reciprocal deviation of each channel of `x`, float32, and move the running ones."""
    rows, channels = _matrix(x)
    part, splits, blocks, tile = _first_stage(rows, channels)
    means, squares = x.new_empty((2, splits, channels), dtype=torch.float32)
    mean, rstd = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    _statistics[(splits, blocks)](x, means, squares, rows, channels, part, **tile)
    _combine_statistics[(triton.cdiv(channels, 32),)](
        means, squares, mean, rstd, running_mean, running_var, rows, channels, part, splits, momentum, eps,
        ROWS=32, COLUMNS=32, **FUSION,
    )  # fmt: skip
    return mean, rstd


def apply(x: Tensor, norm: Norm, residual: Tensor | None, act: str) -> Tensor:
    """Return act((x - mean) * rstd * weight + bias + residual), in the precision of `x`."""
    rows, channels = _matrix(x)
    y = torch.empty_like(x)
    added = x if residual is None else _matching(residual, x)
    _apply[_every_tile(rows, channels)](
        x, added, y, *norm, rows, channels,
        ADDS=residual is not None, ACTIVATION=ACTIVATIONS[act], **_tile(channels),
    )  # fmt: skip
    return y


def gradients(grad_y: Tensor, x: Tensor, y: Tensor | None, norm: Norm, act: str) -> list[Tensor]:
    """Return the gradients of x, weight, bias, and, given `y`, which has a residual in it, of that."""
    rows, channels = _matrix(x)
    part, splits, blocks, tile = _first_stage(rows, channels)
    given = _matching(grad_y, x), x, x if y is None else y, *norm
    kind = {"READS_Y": y is not None, "ACTIVATION": ACTIVATIONS[act]}
    parts = x.new_empty((splits, 2, channels), dtype=torch.float32)
    _backward_sums[(splits, blocks)](*given, parts, rows, channels, part, **kind, **tile)
    grad_weight, grad_bias = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    second = triton.cdiv(channels, 32), 2
    _add_up[second](parts, grad_weight, grad_bias, splits, channels, ROWS=32, COLUMNS=32, **FUSION)
    grad_x = torch.empty_like(x)
    grad_residual = grad_x if y is None else torch.empty_like(x)
    _backward[_every_tile(rows, channels)](
        *given,
        grad_weight,
        grad_bias,
        grad_x,
        grad_residual,
        rows,
        channels,
        WRITES=y is not None,
        **kind,
        **tile,
    )
    found = [grad_x, grad_weight, grad_bias]
    return found if y is None else [*found, grad_residual]


def _matrix(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[1], x.shape[1]


def _matching(given: Tensor, x: Tensor) -> Tensor:
    """Return `given` in the memory layout and precision of `x`."""
    return given.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _tile(channels: int) -> dict[str, int]:
    """Return what a kernel over tiles is compiled with: their shape, and as every one, `FUSION`."""
    columns = min(128, triton.next_power_of_2(channels))
    return {"ROWS": TILE // columns, "COLUMNS": columns, **FUSION}


def _every_tile(rows: int, channels: int) -> tuple[int, int]:
    tile = _tile(channels)
    return triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["COLUMNS"])


def _first_stage(rows: int, channels: int) -> tuple[int, int, int, dict[str, int]]:
    """Return the rows of a program, the programs along rows and along channels, and the tile."""
    tile = _tile(channels)
    tiles, blocks = _every_tile(rows, channels)
    part = triton.cdiv(tiles, min(tiles, max(1, PROGRAMS // blocks))) * tile["ROWS"]
    return part, triton.cdiv(rows, part), blocks, tile

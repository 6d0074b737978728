"""`encode` compiled for a CPU: every value is read once, where PyTorch reads it ten times or more.

ResNet-18's activations of 16 images at five sizes are 80 million values a step.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

TASK = 2**18  # values a task; the same for any number of threads, so that sums are the same bits
_BLOCK = 2048  # values that stay in the first cache while every threshold passes over them

# Sums may be taken in any order, which vector instructions need; NaN stays NaN.
_ANY_ORDER = {"reassoc", "nsz", "contract"}


def encode(rows: Tensor, thresholds: Tensor, levels: Tensor, coded: Tensor) -> Tensor:
    """Write the levels of `rows`, (C, n), into `coded`; thresholds, levels: (C, L).

    Returns (C, 2, L) float64: how many values of each row lie above each threshold, and their sum.
    """
    count, length = rows.shape
    x, out = _bits(rows), _bits(coded)
    limits, table = thresholds.numpy(), _bits(levels.to(rows.dtype).contiguous())
    by_row = max(1, TASK // length)
    by_value = length if length < 2 * TASK else TASK
    parts = -(-length // by_value)
    above = np.zeros((parts, count, 2, levels.shape[1]))

    def task(first: int, part: int) -> None:
        row, value = slice(first, first + by_row), slice(part * by_value, (part + 1) * by_value)
        _encode(x[row, value], limits[row], table[row], out[row, value], above[part, row])

    _in_threads(task, [(first, part) for first in range(0, count, by_row) for part in range(parts)])
    return torch.from_numpy(above.sum(0))


def clipped_ste_backward(gradient: Tensor, values: Tensor, top: Tensor, kept: Tensor) -> None:
    """Write `gradient`, (1, n), where `values` are at most `top`, (1,), into `kept`, and 0 elsewhere."""
    g, x, out = (_bits(t)[0] for t in (gradient, values, kept))
    limit = top.numpy()[0]

    def task(first: int) -> None:
        part = slice(first, first + TASK)
        _clipped_ste_backward(g[part], x[part], limit, out[part])

    _in_threads(task, [(first,) for first in range(0, len(x), TASK)])


def _bits(tensor: Tensor) -> NDArray[Any]:
    """Return the same memory as an array, bfloat16, which NumPy lacks, as 16-bit integers."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        bits: NDArray[Any] = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    values: NDArray[Any] = tensor.numpy()
    return values


def _in_threads(task: Callable[..., None], calls: list[tuple[int, ...]]) -> None:
    if len(calls) == 1:
        task(*calls[0])
        return
    for done in [_pool(torch.get_num_threads()).submit(task, *call) for call in calls]:
        done.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "levels")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has none of the threads


def _compiled(function: Any) -> Any:
    """Compile a function, once for all processes if a folder can be written in which the code is kept."""
    try:
        return njit(nogil=True, cache=True, fastmath=_ANY_ORDER)(function)
    except RuntimeError:  # neither the sources' folder nor the home can be written to
        return njit(nogil=True, fastmath=_ANY_ORDER)(function)


@_compiled
def _widen(block: NDArray[Any], words: NDArray[np.uint32], values: NDArray[np.float32]) -> None:
    """Write float32s or, as 16-bit integers, bfloat16s into `values`, whose memory `words` is too."""
    if block.itemsize == 2:
        for j in range(len(block)):
            words[j] = np.uint32(block[j]) << np.uint32(16)
    else:
        for j in range(len(block)):
            values[j] = block[j]


@_compiled
def _encode(
    rows: NDArray[Any],
    thresholds: NDArray[np.float32],
    levels: NDArray[Any],
    coded: NDArray[Any],
    above: NDArray[np.float64],
) -> None:
    """Write `coded`, and add numbers and sums to `above`, (C, 2, L), see `encode`."""
    words = np.empty(_BLOCK, np.uint32)
    values = words.view(np.float32)
    for c in range(rows.shape[0]):
        for first in range(0, rows.shape[1], _BLOCK):
            block = rows[c, first : first + _BLOCK]
            out = coded[c, first : first + _BLOCK]
            out[:] = block
            _widen(block, words, values)
            for i in range(thresholds.shape[1]):
                threshold, level = thresholds[c, i], levels[c, i]
                number, total = np.int32(0), np.float32(0)
                for j in range(len(block)):
                    is_above = values[j] > threshold
                    out[j] = level if is_above else out[j]
                    number += np.int32(is_above)
                    total += values[j] if is_above else np.float32(0)
                above[c, 0, i] += number
                above[c, 1, i] += total


@_compiled
def _clipped_ste_backward(
    gradient: NDArray[Any], values: NDArray[Any], top: np.float32, kept: NDArray[Any]
) -> None:
    words = np.empty(_BLOCK, np.uint32)
    floats = words.view(np.float32)
    for first in range(0, len(values), _BLOCK):
        block, g = values[first : first + _BLOCK], gradient[first : first + _BLOCK]
        out = kept[first : first + _BLOCK]
        _widen(block, words, floats)
        for j in range(len(block)):
            out[j] = g[j] if floats[j] <= top else 0

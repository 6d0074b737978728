"""Batches that threads finish in the host's memory: FFCV's, and DALI's where there is no GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch, LoaderSpec
from pipelines.normalize import byte_table
from pipelines.resize import MIN_SIZE
from pipelines.utils.errors import UsageError

CHUNK = 4  # images a task: few, so that the threads finish a batch together


class HostBatch:
    """A batch of `count` samples in the works."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        count: int,
        fill: Callable[[int, int], None],
        finish: Callable[[], Batch],
    ) -> None:
        """`fill(first, last)` is called in the pool for chunks of samples, then `finish` in `result`."""
        chunks = [(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
        self._tasks = [pool.submit(fill, *chunk) for chunk in chunks]
        self._finish = finish

    def result(self) -> Batch:
        """Wait for it; raises what `fill` or `finish` have raised."""
        for task in self._tasks:
            task.result()
        return self._finish()

    def cancel(self) -> None:
        """Leave out what has not begun."""
        for task in self._tasks:
            task.cancel()


def iterate_finished(batches: Iterable[HostBatch], ahead: int) -> Iterator[Batch]:
    """The results in order, each while `ahead` later ones are in the works; leaving early cancels those."""
    started: deque[HostBatch] = deque()
    try:
        for batch in batches:
            started.append(batch)
            if len(started) > ahead:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        for abandoned in started:
            abandoned.cancel()


def check_sizes(spec: LoaderSpec) -> None:
    """Raises UsageError if the compiled resize cannot make one of the sizes."""
    if min(spec.sizes) < MIN_SIZE:
        raise UsageError(f"--sizes {min(spec.sizes)}: at least {MIN_SIZE} pixels")


def allocate_blocks(spec: LoaderSpec, count: int) -> list[Tensor]:
    """Room for `count` pictures at each size: (count, s, 3 * s) in the compute dtype."""
    return [torch.empty((count, s, 3 * s), dtype=spec.dtype) for s in spec.sizes]


def as_images(blocks: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """(N, s, 3 * s) each -> (N, 3, s, s) that is channels-last, without a copy."""
    return tuple(b.view(*b.shape[:2], b.shape[1], 3).permute(0, 3, 1, 2) for b in blocks)


def pixel_table(spec: LoaderSpec) -> NDArray[Any]:
    """`resize`'s table from bytes to normalised numbers of the compute dtype."""
    return as_array(byte_table(spec.dtype, spec.normalize))


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The same memory; of the 16-bit types, which numpy or numba lack, the bits."""
    bits = tensor.view(torch.int16) if tensor.itemsize == 2 else tensor
    array: NDArray[Any] = bits.numpy()
    return array

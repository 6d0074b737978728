"""Batches that threads make in host memory: FFCV's, and DALI's without a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch, LoaderSpec
from pipelines.normalize import byte_table
from pipelines.resize import MIN_SIZE
from pipelines.utils.errors import UsageError

CHUNK = 4  # images per task: few, so that the threads finish a batch together


class HostBatch:
    """A batch of `count` samples that threads are working on."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        count: int,
        fill: Callable[[int, int], None],
        finish: Callable[[], Batch],
    ) -> None:
        """Call `fill(first, last)` in the pool for chunks of samples; `result` calls `finish`."""
        chunks = [(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
        self._tasks = [pool.submit(fill, *chunk) for chunk in chunks]
        self._finish = finish

    def result(self) -> Batch:
        """Wait for the batch and return it. Raises what `fill` or `finish` raise."""
        for task in self._tasks:
            task.result()
        return self._finish()

    def cancel(self) -> None:
        """Cancel the chunks that have not started."""
        for task in self._tasks:
            task.cancel()


def iterate_finished(batches: Iterable[HostBatch], ahead: int) -> Iterator[Batch]:
    """Yield the results in order, with `ahead` later ones in progress; leaving early cancels those."""
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
    """Raise UsageError if the compiled resize cannot make one of the sizes."""
    if min(spec.sizes) < MIN_SIZE:
        raise UsageError(f"--sizes {min(spec.sizes)}: at least {MIN_SIZE} pixels")


def allocate_blocks(sizes: Sequence[int], count: int, dtype: torch.dtype) -> list[Tensor]:
    """Allocate `count` images at each size: (count, s, 3 * s)."""
    return [torch.empty((count, s, 3 * s), dtype=dtype) for s in sizes]


def as_images(blocks: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """View each (N, s, 3 * s) as a channels-last (N, 3, s, s), without a copy."""
    return tuple(b.view(*b.shape[:2], b.shape[1], 3).permute(0, 3, 1, 2) for b in blocks)


def pixel_table(spec: LoaderSpec) -> NDArray[Any]:
    """Return `resize`'s table from bytes to normalised values of the compute dtype."""
    return as_array(byte_table(spec.dtype, spec.normalize))


def as_array(tensor: Tensor) -> NDArray[Any]:
    """View the memory as an array; 16-bit floats, which numpy or numba lack, as int16."""
    bits = tensor.view(torch.int16) if tensor.itemsize == 2 else tensor
    array: NDArray[Any] = bits.numpy()
    return array

"""A map over threads that keeps the order and never runs far ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4  # items a thread: enough that none waits, few enough to bound the memory


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result]:
    """`function` of each of the items, in their order; what it raises is raised here.

    Threads do it, because decoding, encoding and reading leave Python's lock; they cannot die alone, as
    processes can. Leaving the iteration early cancels what has not begun.
    """
    pool = ThreadPoolExecutor(threads)
    started: deque[Future[Result]] = deque()
    try:
        for item in items:
            started.append(pool.submit(function, item))
            if len(started) > AHEAD * threads:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

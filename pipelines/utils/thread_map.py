"""A map over threads that keeps the order and takes a bounded number of items ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4  # items per thread: enough to keep all busy, few enough to bound the memory


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    abandon: Callable[[], None] = lambda: None,
    ahead: int = 0,
) -> Generator[Result]:
    """Yield `function(item)` for each of the items, in their order. Raises what `function` raises.

    Threads suffice, because decoding, encoding and reading release the GIL; unlike processes they
    cannot be killed one by one. Leaving the iteration early cancels what has not started, and calls
    `abandon`, by which what has started, which is waited for, may end sooner. ahead: items to take ahead,
    if that is more than threads need to be busy.
    """
    pool = ThreadPoolExecutor(threads)
    started: deque[Future[Result]] = deque()
    try:
        for item in items:
            started.append(pool.submit(function, item))
            if len(started) > max(AHEAD * threads, ahead):
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    except BaseException:
        abandon()
        raise
    finally:
        pool.shutdown(cancel_futures=True)

"""The map over threads: in order, bounded, and it ends when it is left."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from pipelines.utils.thread_map import AHEAD, ordered_map


def test_results_come_in_the_order_of_the_items():
    def late_if_even(i: int) -> int:
        time.sleep(0.002 * (i % 2 == 0))
        return i * i

    assert list(ordered_map(late_if_even, range(50), 4)) == [i * i for i in range(50)]


def test_no_more_than_a_few_items_are_taken_ahead():
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    results = ordered_map(lambda i: i, items(), 2)
    next(results)
    assert len(taken) <= 2 * AHEAD + 2
    results.close()


def test_what_the_function_raises_is_raised_and_the_threads_end():
    def fail(i: int) -> int:
        if i == 3:
            raise ValueError("three")
        return i

    threads = threading.active_count()
    with contextlib.closing(ordered_map(fail, range(1000), 2)) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="three"):
            next(results)
    assert threading.active_count() == threads

"""The deadline controller, on a simulated queue: one server, Poisson arrivals, batches of one size."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from rsnet.serving.size_controller import HOLD_S, MAX_HOLD_S, Cost, SizeController

BATCH = 8
DEADLINE = 100.0
# By size: ms of one image and of a full batch. A second has room for 200, 400 and 1,000 images.
COSTS = {64: Cost(8.0, 40.0), 48: Cost(4.0, 20.0), 32: Cost(2.0, 8.0)}
CAPACITY = {size: 1000 * BATCH / cost.full for size, cost in COSTS.items()}


@dataclass
class _Outcome:
    """Of each request that was answered: when it came, its size, ms until its answer."""

    answers: list[tuple[float, int, float]] = field(default_factory=list)
    refused: int = 0

    def p99(self, since: float = 0.0) -> float:
        taken = sorted(ms for at, _, ms in self.answers if at >= since)
        return taken[int(0.99 * len(taken))]

    def share(self, size: int) -> float:
        return sum(s == size for _, s, _ in self.answers) / len(self.answers)

    def changes(self, since: float = 0.0) -> int:
        sizes = [size for at, size, _ in sorted(self.answers) if at >= since]
        return sum(a != b for a, b in itertools.pairwise(sizes))


def _arrivals(rates: list[tuple[float, float]], seed: int = 0) -> list[float]:
    """Seconds at which requests come: for so many seconds, so many a second."""
    rng, at, end, times = random.Random(seed), 0.0, 0.0, []
    for seconds, rate in rates:
        end += seconds
        while (at := at + rng.expovariate(rate)) < end:
            times.append(at)
        at = end
    return times


def _ms(size: int, images: int) -> float:
    single, full = COSTS[size]
    return single + (full - single) * (images - 1) / (BATCH - 1)


def _simulate(
    times: list[float],
    controller: SizeController | None,
    slower: float = 1.0,
    elsewhere_ms: float = 0.0,
) -> _Outcome:
    """controller: if None, all are 64 pixels. slower: true over expected times of a batch.
    elsewhere_ms: what an answer takes at 64 pixels besides, of which the controller is not told."""
    outcome, waiting, counts = _Outcome(), deque(), Counter()
    free_at = 0.0
    done: list[tuple[float, int, int, list[float]]] = []

    def start(now: float) -> None:
        """Batches of the oldest one's size that begin until now."""
        nonlocal free_at
        while waiting and (begin := max(free_at, waiting[0][0])) <= now:
            size = waiting[0][1]
            batch = [one for one in waiting if one[1] == size and one[0] <= begin][:BATCH]
            for one in batch:
                waiting.remove(one)
            free_at = begin + slower * _ms(size, len(batch)) / 1000
            heapq.heappush(done, (free_at, size, len(batch), [one[0] for one in batch]))

    def finish(now: float) -> None:
        while done and done[0][0] <= now:
            at, size, count, came = heapq.heappop(done)
            counts[size] -= count
            if controller is not None:
                controller.computed(size, count, slower * _ms(size, count))
            for one in came:
                ms = 1000 * (at - one) + (elsewhere_ms if size == 64 else 0)
                outcome.answers.append((one, size, ms))
                if controller is not None:
                    controller.answered(size, ms)

    for now in times:
        start(now)
        finish(now)
        size = controller.choose(now, counts) if controller is not None else 64
        if size is None:
            outcome.refused += 1
        else:
            waiting.append((now, size))
            counts[size] += 1
    start(float("inf"))
    finish(float("inf"))
    return outcome


def _controller() -> SizeController:
    return SizeController(DEADLINE, COSTS, (64, 48, 32), BATCH)


@pytest.mark.parametrize("rate", [190, 300, 700])
def test_p99_keeps_the_deadline_where_the_largest_size_alone_breaks_it(rate):
    times = _arrivals([(15.0, rate)])
    assert _simulate(times, None).p99() > DEADLINE
    controlled = _simulate(times, _controller())
    assert controlled.p99() <= DEADLINE
    assert controlled.refused == 0
    assert len(controlled.answers) == len(times)


@pytest.mark.parametrize("rate", [150, 250])
def test_the_deadline_is_kept_on_a_machine_that_became_slower(rate):
    times = _arrivals([(15.0, rate)])
    assert _simulate(times, None, slower=2.5).p99() > DEADLINE
    assert _simulate(times, _controller(), slower=2.5).p99() <= DEADLINE


@pytest.mark.parametrize("rate", [5, 50, 100])
def test_the_most_accurate_size_is_used_at_low_load(rate):
    assert _simulate(_arrivals([(20.0, rate)]), _controller()).share(64) == 1


@pytest.mark.parametrize(
    "rate", [50, 300, *(pytest.param(rate, marks=pytest.mark.slow) for rate in (190, 500, 900))]
)
def test_the_size_stays_as_it_is_at_constant_load(rate):
    assert _simulate(_arrivals([(30.0, rate)]), _controller()).changes(since=10.0) == 0


def test_a_size_that_is_late_for_reasons_of_its_own_is_tried_ever_more_rarely():
    """The queue says that 64 would do; that its answers are late, only their times say."""
    minutes = 20
    outcome = _simulate(_arrivals([(60.0 * minutes, 20)]), _controller(), elsewhere_ms=120.0)
    assert outcome.p99() <= DEADLINE
    tries = math.log2(MAX_HOLD_S / HOLD_S) + minutes
    assert 2 * 5 < outcome.changes() <= 2 * (tries + 1)


def test_a_burst_brings_a_smaller_size_at_once_and_the_larger_one_comes_back_after_a_calm():
    outcome = _simulate(_arrivals([(5.0, 20), (0.5, 800), (10.0, 20)]), _controller())
    sizes = [(at, size) for at, size, _ in sorted(outcome.answers)]
    assert {size for at, size in sizes if at < 5.0} == {64}
    assert {size for at, size in sizes if 5.1 < at < 5.5 + HOLD_S / 2} == {32}
    assert {size for at, size in sizes if at > 5.5 + 3 * HOLD_S} == {64}
    assert outcome.p99() <= DEADLINE


def test_each_larger_size_is_held_for_a_while_before_the_next():
    outcome = _simulate(_arrivals([(5.0, 800), (15.0, 20)]), _controller())
    rises = [a for a, b in itertools.pairwise(sorted(outcome.answers)) if a[1] < b[1]]
    assert [size for _, size, _ in rises] == [32, 48]
    assert rises[1][0] - rises[0][0] >= HOLD_S * 0.9  # it is asked only when a request comes


def test_what_cannot_be_answered_in_time_is_refused_and_the_rest_is_in_time():
    times = _arrivals([(10.0, 1.5 * CAPACITY[32])])
    outcome = _simulate(times, _controller())
    assert outcome.p99() <= DEADLINE
    assert outcome.refused + len(outcome.answers) == len(times)
    assert len(outcome.answers) > 0.9 * 10 * CAPACITY[32]


def test_one_batch_that_took_very_long_does_not_end_the_answers():
    """As the first on a GPU, or one while the process was stopped; batches are as fast as ever later."""
    controller = _controller()
    controller.computed(64, 1, 20_000.0)
    assert controller.choose(0.0, {64: 1}) is None
    tried = []
    for second in range(60):
        tried.append(controller.choose(float(second), {64: 0}))
        assert tried[-1] is not None
        controller.computed(tried[-1], 1, _ms(tried[-1], 1))
    assert (tried[0], tried[-1]) == (32, 64)


def test_a_deadline_that_no_size_meets_refuses_all():
    assert SizeController(1.0, COSTS, (64, 48, 32), BATCH).choose(0.0, {}) is None


def test_images_that_wait_at_any_size_count():
    assert _controller().choose(0.0, {}) == 64
    assert _controller().choose(0.0, {64: 8, 48: 9}) == 48  # 64 ms are before it
    assert _controller().choose(0.0, {64: 16}) == 32
    assert _controller().choose(0.0, {64: 16, 32: 9}) is None


def test_batches_of_one_image_cost_what_one_image_does():
    costs = {64: Cost(30.0, 30.0), 32: Cost(10.0, 10.0)}
    chosen = [SizeController(100.0, costs, (64, 32), 1).choose(0.0, {64: n}) for n in (0, 1, 2)]
    assert chosen == [64, 64, 32]


def test_answers_of_the_size_before_say_nothing_of_the_one_that_is_chosen_now():
    controller = SizeController(100.0, COSTS, (64, 48, 32), 8)
    for _ in range(3):
        controller.answered(64, 500.0)
    assert [controller.choose(now, {}) for now in (0.0, 0.1)] == [48, 48]
    for _ in range(9):  # that were still under way at the change
        controller.answered(64, 500.0)
    assert controller.choose(0.2, {}) == 48

"""Which size keeps answers within a deadline: smaller as soon as requests pile up, larger after a calm.

Pure: time comes in as an argument, in seconds of any clock, so that it can be simulated.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Parts of the deadline: what an answer may be expected to take, the rest being for decoding and noise; and
# from where on it is not worth trying.
FIT, HOPELESS = 0.7, 0.9
# Part of its capacity that a larger size may be used to. Above, queues grow long by chance alone.
LOAD = 0.7
# Seconds of calm before a larger size is tried. They double, up to a minute, each time that it has to be
# left again within a minute.
HOLD_S, MOST_HOLD_S = 2.0, 60.0
# Seconds of which arrivals are counted; 100 a second give their rate to 7 %.
RATE_S = 2.0
# More late answers of so many mean that the 99th percentile is late.
MOST_LATE, ANSWERS = 2, 200
# Weight of a new batch in how much slower batches are than they were when they were measured.
NEW = 0.1


class Cost(NamedTuple):
    """Milliseconds that a size takes for a batch of one, and for a full one."""

    single: float
    full: float


class SizeController:
    """Chooses the size of each request by what waits, by arrivals, and by how long answers took."""

    def __init__(
        self, deadline_ms: float, costs: Mapping[int, Cost], ladder: Sequence[int], batch_size: int
    ) -> None:
        """deadline_ms: what 99 of 100 answers may take. costs: of every size that requests may have.
        ladder: the sizes to choose from, the most accurate first, each faster than those before.
        batch_size: images in a full batch.
        """
        self._deadline, self._costs, self._batch_size = deadline_ms, costs, batch_size
        self._ladder = tuple(ladder)
        self._level = 0
        self._slowdown = 1.0
        self._arrivals: deque[float] = deque()
        self._answers: deque[float] = deque(maxlen=ANSWERS)
        self._changed = self._rose = -math.inf
        self._hold = HOLD_S

    def choose(self, now: float, waiting: Mapping[int, int]) -> int | None:
        """The size for a request that came `now`; None if none is fast enough, and it had better be refused.

        waiting: images by size that came before, and have no answer yet.
        """
        self._arrivals.append(now)
        while self._arrivals[0] < now - RATE_S:
            self._arrivals.popleft()
        expected = [self._expected(size, waiting) for size in self._ladder]
        if expected[-1] > HOPELESS * self._deadline:
            return None
        fits = [ms <= FIT * self._deadline for ms in expected]
        last = len(self._ladder) - 1
        if not fits[self._level]:
            self._sink(now, next((i for i in range(self._level, last) if fits[i]), last))
        elif self._is_late():
            self._sink(now, min(self._level + 1, last))
        elif self._level > 0 and fits[self._level - 1] and self._is_calm(now):
            self._level -= 1
            self._changed = self._rose = now
            self._answers.clear()
        return self._ladder[self._level]

    def computed(self, size: int, images: int, ms: float) -> None:
        """A batch has taken `ms`."""
        self._slowdown += NEW * (ms / self._ms(size, images) - self._slowdown)

    def answered(self, size: int, ms: float) -> None:
        """A request for which `size` was chosen had its answer after `ms`."""
        if size == self._ladder[self._level]:  # else it says nothing of the size that is chosen now
            self._answers.append(ms)

    def _expected(self, size: int, waiting: Mapping[int, int]) -> float:
        """Milliseconds until a request at this size would be answered."""
        counts = {**waiting, size: waiting.get(size, 0) + 1}
        return self._slowdown * sum(self._ms(s, count) for s, count in counts.items())

    def _ms(self, size: int, images: int) -> float:
        """Milliseconds that so many images take, in batches as full as possible."""
        cost = self._costs[size]
        batches, rest = divmod(images, self._batch_size)
        ms = batches * cost.full
        if rest:
            ms += cost.single + (cost.full - cost.single) * (rest - 1) / (self._batch_size - 1)
        return ms

    def _is_late(self) -> bool:
        return sum(ms > self._deadline for ms in self._answers) > MOST_LATE

    def _is_calm(self, now: float) -> bool:
        """Whether the next larger size would keep up with the arrivals, and it is time to try it."""
        larger = self._costs[self._ladder[self._level - 1]]
        busy_ms = self._slowdown * larger.full / self._batch_size * len(self._arrivals)
        return now - self._changed >= self._hold and busy_ms <= LOAD * 1000 * RATE_S

    def _sink(self, now: float, level: int) -> None:
        if level == self._level:
            return
        was_wrong = now - self._rose < MOST_HOLD_S
        self._hold = min(2 * self._hold, MOST_HOLD_S) if was_wrong else HOLD_S
        self._level, self._changed = level, now
        self._answers.clear()

"""Choice of a size that keeps answers within a deadline: smaller as requests pile up, larger after a calm.

Time comes in as an argument, in seconds of any clock, so that it can be simulated.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Parts of the deadline: FIT, that the expected time of an answer may take, the rest being for decoding and
# noise; HOPELESS, above which the smallest size is refused, too.
FIT, HOPELESS = 0.7, 0.9
# Largest utilization of a larger size. Above, queues grow long by chance alone.
LOAD = 0.7
# Seconds of calm before a larger size is tried. They double, up to a minute, each time that it has to be
# left again within a minute.
HOLD_S, MAX_HOLD_S = 2.0, 60.0
# Seconds of which arrivals are counted; 100 a second give their rate to 7 %.
RATE_S = 2.0
# More late answers of so many mean that the 99th percentile is late.
MAX_LATE, ANSWERS = 2, 200
# Weight of a new batch in the moving average of batch time over measured time.
NEW = 0.1


class Cost(NamedTuple):
    """Milliseconds that a size takes for a batch of one, and for a full one."""

    single: float
    full: float


class SizeController:
    """Chooses the size of each request by what waits, by arrivals, and by how long answers took."""

    def __init__(
        self, deadline_ms: float, costs: Mapping[int, Cost], sizes: Sequence[int], batch_size: int
    ) -> None:
        """Start at the most accurate size.

        deadline_ms: that 99 of 100 answers may take. costs: of every size that requests may have.
        sizes: those to choose from, the most accurate first, each faster than those before.
        batch_size: images in a full batch.
        """
        self._deadline, self._costs, self._batch_size = deadline_ms, costs, batch_size
        self._sizes = tuple(sizes)
        self._index = 0
        self._slowdown = 1.0
        self._arrivals: deque[float] = deque()
        self._answers: deque[float] = deque(maxlen=ANSWERS)
        self._changed = self._rose = -math.inf
        self._hold = HOLD_S

    def choose(self, now: float, waiting: Mapping[int, int]) -> int | None:
        """Return the size for a request that came `now`; None if none is fast enough, to refuse it.

        With nothing else to do, slow batches are no reason: only a batch shows that they are fast again.

        waiting: images by size that came before and have no answer yet.
        """
        self._arrivals.append(now)
        while self._arrivals[0] < now - RATE_S:
            self._arrivals.popleft()
        expected = [self._expected(size, waiting) for size in self._sizes]
        hopeless = HOPELESS * self._deadline
        is_needed = not any(waiting.values()) and self._ms(self._sizes[-1], 1) <= hopeless
        if expected[-1] > hopeless and not is_needed:
            return None
        fits = [ms <= FIT * self._deadline for ms in expected]
        last = len(self._sizes) - 1
        if not fits[self._index]:
            self._switch_down(now, next((i for i in range(self._index, last) if fits[i]), last))
        elif self._is_late():
            self._switch_down(now, min(self._index + 1, last))
        elif self._index > 0 and fits[self._index - 1] and self._is_calm(now):
            self._index -= 1
            self._changed = self._rose = now
            self._answers.clear()
        return self._sizes[self._index]

    def computed(self, size: int, images: int, ms: float) -> None:
        """Note that a batch has taken `ms`."""
        self._slowdown += NEW * (ms / self._ms(size, images) - self._slowdown)

    def answered(self, size: int, ms: float) -> None:
        """Note that a request for which `size` was chosen had its answer after `ms`."""
        if size == self._sizes[self._index]:  # else it says nothing of the size that is chosen now
            self._answers.append(ms)

    def _expected(self, size: int, waiting: Mapping[int, int]) -> float:
        """Return the milliseconds until a request at this size would be answered."""
        counts = {**waiting, size: waiting.get(size, 0) + 1}
        return self._slowdown * sum(self._ms(s, count) for s, count in counts.items())

    def _ms(self, size: int, images: int) -> float:
        """Return the milliseconds that so many images take, in batches as full as possible."""
        cost = self._costs[size]
        batches, rest = divmod(images, self._batch_size)
        ms = batches * cost.full
        if rest:
            ms += cost.single + (cost.full - cost.single) * (rest - 1) / (self._batch_size - 1)
        return ms

    def _is_late(self) -> bool:
        return sum(ms > self._deadline for ms in self._answers) > MAX_LATE

    def _is_calm(self, now: float) -> bool:
        """Return whether the next larger size would keep up with the arrivals, and it is time to try it."""
        larger = self._costs[self._sizes[self._index - 1]]
        busy_ms = self._slowdown * larger.full / self._batch_size * len(self._arrivals)
        return now - self._changed >= self._hold and busy_ms <= LOAD * 1000 * RATE_S

    def _switch_down(self, now: float, index: int) -> None:
        if index == self._index:
            return
        was_wrong = now - self._rose < MAX_HOLD_S
        self._hold = min(2 * self._hold, MAX_HOLD_S) if was_wrong else HOLD_S
        self._index, self._changed = index, now
        self._answers.clear()

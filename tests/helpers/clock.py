"""Time that a test makes pass, for what measures it."""

from __future__ import annotations


class Clock:
    """Time that passes only where the test says so, and a microsecond with every look at it."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


class SlowLoader:
    """A loader that takes its time with every batch."""

    def __init__(self, loader, clock, pause):
        self._loader, self._clock, self._pause = loader, clock, pause

    def __len__(self):
        return len(self._loader)

    def state_dict(self):
        return self._loader.state_dict()

    def set_epoch(self, epoch):
        self._loader.set_epoch(epoch)

    def __iter__(self):
        for batch in self._loader:
            self._clock.pause(self._pause)
            yield batch

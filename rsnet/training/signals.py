"""Signals that ask a training to stop: noted, obeyed after the step; a second one ends at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C; SIGTERM, which schedulers send before SIGKILL; SIGUSR1 and SIGUSR2, which Slurm can send ahead
# of the time limit; a closed terminal; the CPU time limit.
SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
    signal.SIGXCPU,
)
# A terminal's end is told by the kernel and by the shell, a limit of CPU time every second from then on.
REPEATED = (signal.SIGHUP, signal.SIGXCPU)


class TrainingInterrupted(Exception):  # noqa: N818 - it is what was asked for
    """A training that was asked to stop, and has saved its state. Exit code 128 + the signal's number."""

    def __init__(self, number: int, place: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: saved after {place}")
        self.exit_code = 128 + number


@contextmanager
def handlers_put_back() -> Iterator[None]:
    """Restore the current signal handlers at the end of the block."""
    before = _handlers()
    try:
        yield
    finally:
        _put_back(before)


def _handlers() -> dict[signal.Signals, Any]:
    return {number: signal.getsignal(number) for number in SIGNALS}


def _put_back(before: Mapping[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        if handler is not signal.getsignal(number):
            signal.signal(number, handler)


class StopRequest:
    """The first signal that came, or 0."""

    def __init__(self) -> None:
        self.number = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals in this block, but for those that were ignored before, as nohup and shells do.

        A second signal ends the process at once; that is safe, because a save changes existing files by
        renaming only. After a stop the handlers stay, while the run uploads and waits for other ranks,
        whose signal may arrive later.
        """
        before, stopped = _handlers(), False
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._note)
        try:
            yield
        except TrainingInterrupted:
            stopped = True
            raise
        finally:
            if not stopped:
                _put_back(before)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.number and number in REPEATED:
            return
        if self.number:
            os._exit(128 + number)
        self.number = number

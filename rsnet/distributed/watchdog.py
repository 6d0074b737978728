"""Watchdog: ends a run of several processes in which one hangs or is lost, and names it."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipelines.utils.errors import RunError, first_line
from pipelines.utils.output import say
from rsnet.distributed.rendezvous import connect


class Watchdog:
    """Ends a run in which a rank hangs. Each rank writes a heartbeat and its progress to a store. log:
    called with the message before the process exits.

    Collectives alone would wait for a stuck rank, or say that some rank is missing.
    """

    def __init__(self, timeout_s: float, log: Callable[[str], None]) -> None:
        self._timeout, self._log = timeout_s, log
        self._interval = min(2.0, timeout_s / 8)
        self._ticks = 0
        self._done = threading.Event()
        self._store: Any = None  # while it runs
        self._rank = 0
        self._others: list[int] = []

    def tick(self) -> None:
        """Note that the training made progress."""
        self._ticks += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch during this block. Raises RunError, with the rank, if another one was lost in it."""
        if not dist.is_initialized():
            yield
            return
        self._rank, world = dist.get_rank(), dist.get_world_size()
        self._others = [r for r in range(world) if r != self._rank]
        # A connection of its own: the process group's may be busy waiting.
        store = connect(timedelta(seconds=self._timeout))
        self._store = dist.PrefixStore("alive", store)  # type: ignore[attr-defined]
        self._tell()
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        except RuntimeError as error:
            if not is_collective_error(error):
                raise
            raise RunError(f"{self._who()} ({first_line(error)})") from error
        finally:
            self._done.set()
            thread.join(2 * self._interval)

    def _watch(self) -> None:
        seen, since = -1, time.monotonic()
        while not self._done.wait(self._interval):
            if self._ticks != seen:
                seen, since = self._ticks, time.monotonic()
            with suppress(RuntimeError):
                self._tell()
            if time.monotonic() - since > self._timeout:
                line = f"no update for {self._timeout:.0f} s (--timeout): {self._who()}"
                if self._ticks != seen:
                    continue
                self._log(f"rank {self._rank}: {line}")
                say(f"rank {self._rank}: error: {line}", sys.stderr)
                if self._rank == 0:  # which may have the store that others are asking
                    self._wait(4)
                os._exit(RunError.exit_code)  # the main thread may wait for the rank that is stuck

    def _tell(self) -> None:
        self._store.set(str(self._rank), f"{time.monotonic()} {self._ticks}")

    def _told(self) -> dict[int, tuple[float, int]]:
        """Return what other ranks told last: a moment of their clock, and their ticks."""
        found = {}
        for rank in self._others:
            if self._store.check([str(rank)]):
                moment, ticks = self._store.get(str(rank)).decode().split()
                found[rank] = float(moment), int(ticks)
        return found

    def _wait(self, intervals: int) -> None:
        """Wait, and tell others, who may ask at the same time, that this one lives."""
        for _ in range(intervals):
            time.sleep(self._interval)
            with suppress(RuntimeError):
                self._tell()

    def _who(self) -> str:
        """Return a description of the rank that makes no progress. Takes three intervals."""
        try:
            before = self._told()
            self._wait(3)
            after = self._told()
        except RuntimeError as error:
            return f"rank 0's machine does not answer: {first_line(error)}"
        silent = [r for r in self._others if r not in after or after[r][0] == before[r][0]]
        if silent:
            return f"{_ranks(silent)} ended, hung, or lost the connection"
        behind = [r for r in self._others if after[r][1] < self._ticks]
        if behind:
            return (
                f"no progress of {_ranks(behind)}, which still runs: is the loading of data stuck?"
            )
        return f"rank {self._rank} itself does not go on: its data?"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {' and '.join(map(str, ranks))}"


@contextmanager
def lost_process_as_run_error() -> Iterator[None]:
    """Raise RunError if the block fails because another process was lost."""
    try:
        yield
    except RuntimeError as error:
        if not is_collective_error(error):
            raise
        raise RunError(f"another process was lost: {first_line(error)}") from error


# How gloo's errors begin, which have no type of their own: with the file of its source that raised them.
OF_GLOO = re.compile(r"\[\S*\bgloo/")
# What calls gloo: torch's collectives, DDP, its hooks in a backward; and here, what waits for one.
CALLERS = ("torch.distributed.", "torch.nn.parallel.", "torch.autograd.", "rsnet.distributed.")


def is_collective_error(error: RuntimeError) -> bool:
    """Return whether an error comes from what processes do together, because one of them is not there.

    NCCL's, the network's and the store's have types of their own. Words alone decide nothing: a file may have
    any of them in its name.
    """
    if not dist.is_initialized():
        return False
    if isinstance(error, dist.DistError):
        return True
    frames = [*traceback.walk_tb(error.__traceback__)]
    caller = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return (
        type(error) is RuntimeError
        and OF_GLOO.match(str(error)) is not None
        and caller.startswith(CALLERS)
    )

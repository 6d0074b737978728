"""Reads samples of remote shards: from the cache, to which threads copy whole shards ahead of their use.

If the order has few shards open at a time, a sample waits for its shard, as further samples of it follow.
If an epoch mixes the samples of all shards, the first samples would wait for all shards: they wait for
`PATIENCE` seconds in total, in which a small data set arrives, and are then read with a request each until
their shard is there. Without a known order, a shard is fetched when it is first read. The processes of a
machine share one order, and none runs further ahead of the slowest than the cache has room.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.sources.cache_options import size_as_option
from pipelines.sources.shard_cache import Outcome, ShardCache, SharedOrder
from pipelines.sources.source import SharedReads
from pipelines.storage.remote import Remote, RemoteObject, Stopped
from pipelines.utils.errors import RunError, UsageError
from pipelines.utils.progress import format_bytes
from pipelines.utils.reading import bytes_of, reading

FETCHERS = 4  # shards at once: while one is checked or waited for, others come
PATIENCE = 10.0  # seconds that samples of a mixed order wait for whole shards
POLL = 0.1  # seconds between looks at what other processes do
PIN_EVERY = 1.0  # seconds between notes of what is no longer needed, and between looks for room
STARVED = 60.0  # seconds without room for a shard that cannot be read by range, which end the run


class ShardReader:
    """The shards of one split. items: the objects, by the number of the shard."""

    def __init__(
        self,
        remote: Remote,
        items: Sequence[RemoteObject],
        cache: ShardCache,
    ) -> None:
        self.items, self.cache = items, cache
        # Raises if the file of a shard, by its number, is not the one that the index describes.
        self.check: Callable[[int, Path], None] = lambda *_: None
        self._remote = remote
        self._ahead: _Ahead | None = None
        self._given_up = threading.Event()
        self._rounds = 0  # calls of `expect`

    def expect(self, shards: NDArray[np.int64], of_machine: SharedReads | None = None) -> None:
        """Fetch ahead what reads of these shards, one each, need in this order.

        of_machine: what all its processes read, if this one is not alone. They fetch in that order, no
        further ahead of the last of them than the cache has room, so that none fetches anew what another had.

        Raises UsageError.
        """
        self.stop()
        self._rounds += 1
        self._given_up = threading.Event()
        sizes = np.array([item.size for item in self.items], np.int64)
        needed = _most_at_once(shards, sizes)
        if needed > self.cache.limit:
            raise UsageError(
                f"--cache-size {format_bytes(self.cache.limit)}: shards of {format_bytes(needed)} are read "
                f"from at once; give --cache-size {size_as_option(needed)} or more"
            )
        used = np.unique(shards)
        is_mixed = len(used) > 1 and needed > sizes[used].sum() / 2
        if of_machine is not None and _most_at_once(of_machine.what, sizes) > self.cache.limit:
            of_machine = None  # each fetches for itself alone
        self.cache.join(None if of_machine is None else self._shared(of_machine))
        self._ahead = _Ahead(self, shards, of_machine, PATIENCE if is_mixed else None)

    def _shared(self, reads: SharedReads) -> SharedOrder:
        """Return the order of this machine's processes as the cache knows it."""
        order = _by_first_use(reads.what)
        names = [self.cache.path_of(self.items[shard]).name for shard in order]
        # A machine's trainings differ in their port; a training's processes call `expect` alike.
        run = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"), self._rounds
        text = "\0".join([*names, *map(str, (*run, reads.processes))])
        ends = np.cumsum([self.items[shard].size for shard in order])
        return SharedOrder(
            hashlib.sha256(text.encode()).hexdigest()[:24],
            {name: i for i, name in enumerate(names)},
            reads.processes,
            int(np.searchsorted(ends, self.cache.limit, "right")),
        )

    def stop(self) -> None:
        """Fetch nothing ahead any longer; reads that wait, and all until the next `expect`, raise Stopped."""
        self._given_up.set()
        ahead, self._ahead = self._here(), None
        if ahead is not None:
            ahead.stop()

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return bytes of a shard. Raises RunError, UsageError, DataError; Stopped."""
        ahead, item = self._here(), self.items[shard]
        path = self.cache.path_of(item)
        try:
            while True:
                with contextlib.suppress(FileNotFoundError), reading(path):
                    return bytes_of(path, offset, length)
                is_coming = ahead.wait(shard) if ahead else self.fetch(shard) is not Outcome.FULL
                if not is_coming and item.by_range:
                    stop = min(offset + length, item.size)
                    return self._remote.read(item, offset, stop, self._given_up)
        finally:
            if ahead is not None:
                ahead.note_read(shard)

    def _here(self) -> _Ahead | None:
        """Return what fetches ahead, None in a fork of its process, which has no threads."""
        ahead = self._ahead
        return ahead if ahead is not None and ahead.process == os.getpid() else None

    def fetch(self, shard: int) -> Outcome:
        """Bring a shard into the cache; wait a moment if another process is doing that."""
        item = self.items[shard]
        outcome = self.cache.fetch(
            item,
            lambda file: self._remote.copy(item, file, self._given_up),
            lambda path: self.check(shard, path),
        )
        if outcome is Outcome.BUSY and self._given_up.wait(POLL):
            raise Stopped
        return outcome

    @contextmanager
    def held(self, shard: int) -> Iterator[str]:
        """Give the path of a shard's file, which `expect` has named, in a block."""
        ahead = self._here()
        assert ahead is not None
        ahead.wait(shard, whole=True)
        yield str(self.cache.path_of(self.items[shard]))
        ahead.note_read(shard)


class _Ahead:
    """Threads that fetch shards in the order of their first use, as far as the cache has room.

    of_machine: what it reads together with other processes, if it does.
    """

    def __init__(
        self,
        reader: ShardReader,
        shards: NDArray[np.int64],
        of_machine: SharedReads | None,
        patience: float | None,
    ) -> None:
        self.process = os.getpid()
        self._reader, self._patience = reader, patience
        self._left = np.bincount(shards, minlength=len(reader.items))
        self._order = _by_first_use(shards if of_machine is None else of_machine.what)
        self._places = {shard: i for i, shard in enumerate(self._order)}
        self._reads = 0
        # Shards that another process may still read, and the number of reads after which none does.
        self._others: dict[int, int] = {}
        if of_machine is not None:
            used, last = np.unique(of_machine.what[::-1], return_index=True)
            ends = np.searchsorted(of_machine.own, len(of_machine.what) - 1 - last, "right")
            self._others = dict(zip(used.tolist(), ends.tolist(), strict=True))
        self._ending = deque(sorted(self._others, key=lambda shard: self._others[shard]))
        self._started = time.monotonic()
        self._changed = threading.Condition()
        self._next = 0  # place in the order of the first shard that has not been admitted
        self._admitted: set[int] = set()  # and still needed
        self._wanted: list[int] = []  # admitted, and neither known to be there nor being fetched
        self._fetching: list[int] = []
        self._used = 0  # bytes of the admitted
        cache = reader.cache
        self._needed = {cache.path_of(reader.items[shard]).name for shard in self._order}
        self._room = cache.pin([], self._needed)
        self._moved = self._started  # when others of the order were last seen to go on
        self._full: dict[int, float] = {}  # shards for which there is no room, and since when
        self._early: dict[int, float] = {}  # to which others have not come
        self._error: Exception | None = None
        self._is_stopped = False
        self._pinned: set[int] = set()
        self._pinned_at = 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"shards-{i}", daemon=True)
            for i in range(min(FETCHERS, len(self._order)))
        ]
        with self._changed:
            self._admit()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._reader.cache.pin([], place=len(self._order))

    def wait(self, shard: int, *, whole: bool = False) -> bool:
        """Wait for a shard; return whether it may be there, False if it is better read by range.

        whole: it is never to be read by range. Raises what fetching it raised.
        """
        began, item = time.monotonic(), self._reader.items[shard]
        with self._changed:
            while not self._reader.cache.has(item):
                if self._error is not None:
                    raise self._error
                if self._is_stopped:
                    raise Stopped
                self._request(shard, began)
                if item.by_range and not whole and self._should_read_by_range(shard):
                    return False
                if self._is_starved(shard):
                    raise self._starved(shard)
                self._changed.wait(POLL)
        return True

    def _request(self, shard: int, began: float) -> None:
        """See to it that a shard for which a read has waited since `began` is fetched, or will be."""
        if shard not in self._admitted and self._is_due(shard, began):
            self._left[shard] = max(self._left[shard], 1)
            self._take(shard, first=True)
        elif shard in self._admitted and shard not in {*self._wanted, *self._fetching}:
            self._wanted.insert(0, shard)  # it was in the cache, and something removed it
            self._changed.notify()
        if not self._may_fetch(shard):
            self._admit(POLL)
            self._early.setdefault(shard, time.monotonic())
            if self._is_starved(shard):
                self._leave()

    def _should_read_by_range(self, shard: int) -> bool:
        """Return whether a sample is not to wait for its shard any longer."""
        has_no_room = self._room.is_crowded and shard in self._full
        return has_no_room or self._is_starved(shard) or self._is_over()

    def _may_fetch(self, shard: int) -> bool:
        """Return whether all processes that share the order have come to a shard; strangers wait for none."""
        return self._room.is_crowded or self._places.get(shard, -1) < self._room.common

    def _is_starved(self, shard: int) -> bool:
        """Return whether there was no room for a shard for long, in which no other process went on."""
        since = min(found.get(shard, math.inf) for found in (self._full, self._early))
        return time.monotonic() > max(since, self._moved) + STARVED

    def _leave(self) -> None:
        """Fetch for this process alone from now on: another has not gone on for long, or never came."""
        self._reader.cache.join(None)
        self._early.clear()
        self._others.clear()
        self._ending.clear()
        self._drop([shard for shard in self._admitted if not self._is_needed(shard)])

    def _is_due(self, shard: int, began: float) -> bool:
        """Return whether a shard is fetched out of its turn: nobody expected it, or others have its room."""
        has_less = self._room.size < self._reader.cache.limit
        return self._left[shard] <= 0 or (has_less and time.monotonic() > began + PIN_EVERY)

    def _starved(self, shard: int) -> RunError:
        cache, item = self._reader.cache, self._reader.items[shard]
        return RunError(
            f"--cache: there is no room for {item.url}: other processes read what {cache.folder} holds; give "
            "this one a folder of its own, or both a larger --cache-size"
        )

    def _is_over(self) -> bool:
        """Return whether samples have waited long enough for whole shards."""
        return self._patience is not None and time.monotonic() > self._started + self._patience

    def note_read(self, shard: int) -> None:
        """Note that one read of a shard is done."""
        with self._changed:
            self._left[shard] -= 1
            self._reads += 1
            ended = {shard}
            while self._ending and self._others[self._ending[0]] <= self._reads:
                ended.add(self._ending.popleft())
            done = [one for one in ended if one in self._admitted and not self._is_needed(one)]
            self._drop(
                done, is_awaited=bool(done and (self._others or len(done) == len(self._admitted)))
            )

    def _drop(self, shards: Iterable[int], is_awaited: bool = True) -> None:
        """Keep these no longer. is_awaited: let others know at once."""
        for shard in shards:
            self._admitted.remove(shard)
            self._used -= self._reader.items[shard].size
            self._reader.cache.note_use(self._reader.items[shard])
            self._changed.notify()
        if is_awaited:
            self._pinned_at = 0.0
            self._admit()

    def _is_needed(self, shard: int) -> bool:
        """Return whether this process is still to read a shard, or one that is not ahead of it."""
        return bool(self._left[shard] > 0 or self._others.get(shard, 0) > self._reads)

    def _take(self, shard: int, first: bool = False) -> None:
        self._admitted.add(shard)
        self._used += self._reader.items[shard].size
        self._wanted.insert(0 if first else len(self._wanted), shard)
        self._pinned_at = 0.0  # before it is fetched
        self._changed.notify()

    def _admit(self, every: float = PIN_EVERY) -> None:
        """Take as many more shards as there is room for, one at least, and let no process remove them.

        every: seconds between looks at what others have come to.
        """
        before = self._next
        while self._next < len(self._order):
            shard = self._order[self._next]
            if self._admitted and self._used + self._reader.items[shard].size > self._room.size:
                break
            self._next += 1
            if self._is_needed(shard) and shard not in self._admitted:
                self._take(shard)
        now = time.monotonic()
        is_due = before != self._next or now > self._pinned_at + every
        end = len(self._order)
        is_waiting = self._next < end or self._room.common < end
        if is_due and (self._pinned != self._admitted or is_waiting):
            items = (self._reader.items[shard] for shard in self._admitted)
            last = self._room
            self._room = self._reader.cache.pin(items, self._needed, self._next, self._reads)
            self._pinned, self._pinned_at = set(self._admitted), now
            if (self._room.common, self._room.reads) != (last.common, last.reads):
                self._moved = now
                self._changed.notify_all()

    def _work(self) -> None:
        try:
            while (shard := self._next_wanted()) is not None:
                self._note_outcome(shard, self._reader.fetch(shard))
        except Stopped:
            return
        except Exception as error:  # of the readers, which wait for it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_wanted(self) -> int | None:
        """Return the next shard to fetch, once there is one; None at the end."""
        with self._changed:
            self._admit()
            while (shard := self._first_wanted()) is None and not self._is_stopped:
                self._changed.wait(PIN_EVERY)
                self._admit()
            if shard is None or self._is_stopped or self._error is not None:
                return None
            self._wanted.remove(shard)
            self._early.pop(shard, None)
            self._fetching.append(shard)
            return shard

    def _first_wanted(self) -> int | None:
        return next((shard for shard in self._wanted if self._may_fetch(shard)), None)

    def _note_outcome(self, shard: int, outcome: Outcome) -> None:
        with self._changed:
            if outcome is Outcome.FULL:
                self._full.setdefault(shard, time.monotonic())
                self._changed.notify_all()
                self._changed.wait(PIN_EVERY)
            else:
                self._full.pop(shard, None)
            self._fetching.remove(shard)
            if outcome is not Outcome.THERE and shard in self._admitted:
                self._wanted.insert(min(FETCHERS, len(self._wanted)), shard)
            self._changed.notify_all()


def _by_first_use(shards: NDArray[np.int64]) -> list[int]:
    """Return each shard once."""
    _, first = np.unique(shards, return_index=True)
    found: list[int] = shards[np.sort(first)].tolist()
    return found


def _most_at_once(shards: NDArray[np.int64], sizes: NDArray[np.int64]) -> int:
    """Return the most bytes of shards that reads have begun with and not yet finished, at any time."""
    if not len(shards):
        return 0
    used, first = np.unique(shards, return_index=True)
    last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
    change = np.zeros(len(shards) + 1, np.int64)
    np.add.at(change, first, sizes[used])
    np.add.at(change, last + 1, -sizes[used])
    return int(np.cumsum(change).max())

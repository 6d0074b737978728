"""A bounded folder of whole shards, which all processes of a machine share.

A shard gets its final name when it is complete, so a killed process leaves no partial one under it. Names
contain a hash of the object's tag, or else of its content: a changed object is another shard. Locks are the
kernel's and end with the process. The least recently used shards (by file time) are evicted first; pinned
shards, and files that are not the cache's, are never removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from pipelines.storage.remote import RemoteObject
from pipelines.utils.atomic_io import atomic_write, free_space, fsync
from pipelines.utils.errors import RunError, UsageError, os_error_line, way_out

PARTIAL = ".partial"
SPARE = 64 << 20  # bytes of the disk that are left free
_OF_SHARD = re.compile(r"[0-9a-f]{24}-.+")
_OF_PINS = re.compile(r"\d+-[0-9a-f]{8}\.json")


class Outcome(Enum):
    """What became of an attempt to fetch a shard."""

    THERE = "it is in the cache"
    BUSY = "another process is fetching it"
    FULL = "all that could make room is in use"


class SharedOrder(NamedTuple):
    """An order in which some processes of this machine read shards together.

    key: the same for them, and no others. places: of the files' names in it. processes: their number. start:
    so many shards fit in the cache at first.
    """

    key: str
    places: Mapping[str, int]
    processes: int
    start: int


class Room(NamedTuple):
    """What a process may keep in the cache.

    size: bytes for the shards that it needs. is_crowded: whether processes outside its order have pinned
    shards. common: position in the order that all of its processes have reached. reads: number of reads of
    the others in it.
    """

    size: int
    is_crowded: bool
    common: float
    reads: int


class _Note(NamedTuple):
    """What a process keeps, by name, and where it is in an order: at a place, after so many reads."""

    shards: Mapping[str, int] = {}
    order: str = ""
    place: int = 0
    reads: int = 0


class ShardCache:
    """Shards in `folder`, of at most `limit` bytes together."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        """limit: None for half of what the disk has for them. Raises UsageError without a folder."""
        self.folder = folder
        self._shards, self._locks, self._pins = (folder / n for n in ("shards", "locks", "pins"))
        self._own = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._order: SharedOrder | None = None
        self._seen: set[str] = set()  # the other processes of that order, also those that are gone
        self._own_lock = FileLock(
            self._locks / f"{self._own}.lock", thread_local=False, fallback_to_soft=False
        )
        try:
            for path in (self._shards, self._locks, self._pins):
                path.mkdir(parents=True, exist_ok=True)
            with self._alone():
                kept = sum(state.st_size for state in self._states().values())
            free = free_space(folder)
        except OSError as error:
            raise UsageError(
                f"--cache: {folder} cannot be used: {os_error_line(error)}; name a folder on a local disk"
            ) from None
        if limit is None and math.isinf(free):
            raise UsageError(
                f"--cache: the file system of {folder} does not tell its free space; give --cache-size"
            )
        self.limit = int((free + kept) / 2) if limit is None else limit

    def path_of(self, item: RemoteObject) -> Path:
        """Return where an object lies, if it is there."""
        what = f"{item.url}\0{item.state}\0{item.size}"
        return self._shards / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}-{item.name}"

    def has(self, item: RemoteObject) -> bool:
        """Return whether an object is there."""
        try:
            return self.path_of(item).stat().st_size == item.size
        except OSError:
            return False

    def note_use(self, item: RemoteObject) -> None:
        """Let an object that is there be the last to be removed."""
        with contextlib.suppress(OSError):
            os.utime(self.path_of(item))

    def join(self, order: SharedOrder | None) -> None:
        """Join an order in place of an earlier one. Of it, only shards that all processes have reached
        count as pinned.
        """
        self._order, self._seen = order, set()

    def pin(
        self,
        items: Iterable[RemoteObject],
        needed: Set[str] = frozenset(),
        place: int = 0,
        reads: int = 0,
    ) -> Room:
        """Keep these objects, and no others of earlier calls, from being removed by any process.

        place: in the order that was joined, up to which this process has come. reads: those that it has done.

        Returns how many bytes of objects with the names `needed` should be kept, so that processes which need
        others have their part, or what they leave of it. Raises RunError if a file cannot be written.
        """
        shards = {self.path_of(item).name: item.size for item in items}
        own = _Note(shards, self._order.key if self._order else "", place, reads)
        try:
            with self._alone():
                if not self._own_lock.is_locked:
                    self._own_lock.acquire(timeout=0)
                path = self._pins / f"{self._own}.json"
                if own.shards or own.order:
                    atomic_write(path, json.dumps(own._asdict()).encode(), alone=True)
                else:
                    path.unlink(missing_ok=True)
                notes = self._notes_of_others()
        except OSError as error:
            raise self._cannot_write(error) from None
        members = [note for note in notes.values() if own.order and note.order == own.order]
        strangers = [note for note in notes.values() if note not in members]
        # By stranger, what it keeps and this process does not need. Two may keep the same shard.
        foreign = [
            {name: size for name, size in note.shards.items() if name not in needed}
            for note in strangers
        ]
        taken = sum({name: size for one in foreign for name, size in one.items()}.values())
        parts = 1 + sum(map(bool, foreign))
        return Room(
            size=max(self.limit // parts, self.limit - taken),
            is_crowded=any(note.shards for note in strangers),
            common=self._common(own, notes),
            reads=sum(note.reads for note in members),
        )

    def fetch(
        self,
        item: RemoteObject,
        copy: Callable[[int], None],
        check: Callable[[Path], None] = lambda _: None,
    ) -> Outcome:
        """Bring an object into the cache, if it is not there.

        copy: writes it to an open file. check: raises if a file is not what it should be.

        Raises what both do; RunError if the disk is full.
        """
        if self.has(item):
            self.note_use(item)
            return Outcome.THERE
        path = self.path_of(item)
        lock = FileLock(self._locks / f"{path.name}.lock", timeout=0, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            return Outcome.BUSY
        partial = path.with_name(path.name + PARTIAL)
        try:
            if self.has(item):
                return Outcome.THERE
            if not self._reserve(partial, item.size):
                return Outcome.FULL
            with partial.open("r+b") as file:
                copy(file.fileno())
                fsync(file.fileno(), partial)
            check(partial)
            partial.rename(path)
            return Outcome.THERE
        except OSError as error:
            raise self._cannot_write(error) from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
            lock.release()

    def _cannot_write(self, error: OSError) -> RunError:
        return RunError(
            f"--cache: cannot write {self.folder}: {error.strerror or error}{way_out(error)}"
        )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of the folder's contents, for milliseconds."""
        with FileLock(self.folder / ".lock", fallback_to_soft=False):
            yield

    def _reserve(self, partial: Path, size: int) -> bool:
        """Make a file of the right size for a shard, removing others; return whether there is room.

        It counts from now on, as if it were whole.
        """
        with self._alone():
            with contextlib.suppress(OSError):
                partial.unlink()  # of a process that was killed
            states = self._states()
            room = self._room(states)
            if room < size:
                pinned = self._pinned()
                for path in sorted(states, key=lambda one: states[one].st_mtime_ns):
                    if self._is_free(path, pinned):
                        path.unlink(missing_ok=True)
                        del states[path]
                        room = self._room(states)
                        if room >= size:
                            break
            if room < size:
                if sum(state.st_size for state in states.values()) + size <= self.limit:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
                return False
            with partial.open("wb") as file:
                file.truncate(size)
            return True

    def _states(self) -> dict[Path, os.stat_result]:
        """Return the cache's own files: whole shards, and those that are being fetched."""
        found = {}
        for path in self._shards.iterdir():
            if _OF_SHARD.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    state = path.stat()
                    if stat.S_ISREG(state.st_mode):
                        found[path] = state
        return found

    def _room(self, states: dict[Path, os.stat_result]) -> float:
        """Return the bytes that another shard may have; what is to be written to others is theirs."""
        used = sum(state.st_size for state in states.values())
        coming = [state for path, state in states.items() if path.name.endswith(PARTIAL)]
        promised = sum(max(0, state.st_size - 512 * state.st_blocks) for state in coming)
        return min(self.limit - used, free_space(self._shards) - SPARE - promised)

    def _is_free(self, path: Path, pinned: set[str]) -> bool:
        """Return whether nobody needs a file: a shard that is not pinned, or what a killed process left."""
        if not path.name.endswith(PARTIAL):
            return path.name not in pinned
        return _can_lock(self._locks / f"{path.name.removesuffix(PARTIAL)}.lock")

    def _pinned(self) -> set[str]:
        """Return the shards that a process keeps.

        Of an order, those to which all of its processes have come: one that is ahead takes nobody's room.
        """
        own, notes = _read_note(self._pins / f"{self._own}.json"), self._notes_of_others()
        common, order = self._common(own, notes), self._order
        return {
            name
            for note in (own, *notes.values())
            for name in note.shards
            if order is None or note.order != order.key or order.places.get(name, -1) < common
        }

    def _common(self, own: _Note, notes: Mapping[str, _Note]) -> float:
        """Return the place in the order up to which all have come; who has not begun stands at its start."""
        order = self._order
        if order is None:
            return math.inf
        members = {stem: note.place for stem, note in notes.items() if note.order == order.key}
        self._seen |= members.keys()
        is_complete = len(self._seen) >= order.processes - 1
        return min([own.place, *members.values(), *([] if is_complete else [order.start])])

    def _notes_of_others(self) -> dict[str, _Note]:
        """Return what each of the other processes keeps, by its name; forget those that are gone."""
        found = {}
        for path in self._pins.iterdir():
            if path.stem == self._own or not _OF_PINS.fullmatch(path.name):
                continue
            lock = self._locks / f"{path.stem}.lock"
            if _can_lock(lock):
                for gone in (path, lock):
                    gone.unlink(missing_ok=True)
            else:
                found[path.stem] = _read_note(path)
        return found


def _read_note(path: Path) -> _Note:
    """Return a process's note; one of nothing without a file. Earlier versions wrote names alone."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return _Note()
    if isinstance(found, dict) and "order" in found:
        return _Note(**found)
    return _Note(found if isinstance(found, dict) else dict.fromkeys(found, 0))


def _can_lock(path: Path) -> bool:
    """Return whether nobody holds a lock."""
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        return False
    lock.release()
    return True

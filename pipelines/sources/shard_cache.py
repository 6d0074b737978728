"""A bounded folder of whole shards, which all processes of a machine share.

A shard gets its name when it is whole: what a killed process leaves has another one. Names contain a hash of
the object's tag: a changed object is another shard. Locks are the kernel's, which ends them with the process.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path

from filelock import FileLock, Timeout

from pipelines.storage.remote import RemoteObject
from pipelines.utils.atomic_io import atomic_write, free_space, fsync
from pipelines.utils.errors import DataError, UsageError, os_error_line, way_out

PARTIAL = ".partial"
SPARE = 64 << 20  # bytes of the disk that are left free


class Outcome(Enum):
    """What became of an attempt to fetch a shard."""

    THERE = "it is in the cache"
    BUSY = "another process is fetching it"
    FULL = "all that could make room is in use"


class ShardCache:
    """Shards in `folder`, of at most `limit` bytes together."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        """limit: None for half of what the disk has for them. Raises UsageError without a folder."""
        self.folder = folder
        self._shards, self._locks, self._pins = (folder / n for n in ("shards", "locks", "pins"))
        self._own = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._own_lock = FileLock(
            self._locks / f"{self._own}.lock", thread_local=False, fallback_to_soft=False
        )
        try:
            for path in (self._shards, self._locks, self._pins):
                path.mkdir(parents=True, exist_ok=True)
            with self._alone():
                kept = sum(path.stat().st_size for path in self._shards.iterdir())
            free = free_space(folder)
        except OSError as error:
            raise UsageError(
                f"--cache: {folder} cannot be used: {os_error_line(error)}; name a folder on a local disk"
            ) from None
        self.limit = int((free + kept) / 2) if limit is None else limit

    def path_of(self, item: RemoteObject) -> Path:
        """Return where an object lies, if it is there."""
        state = f"{item.url}\0{item.tag}\0{item.size}"
        return self._shards / f"{hashlib.sha256(state.encode()).hexdigest()[:24]}-{item.name}"

    def has(self, item: RemoteObject) -> bool:
        """Return whether an object is there."""
        try:
            return self.path_of(item).stat().st_size == item.size
        except OSError:
            return False

    def pin(self, items: Iterable[RemoteObject]) -> None:
        """Keep these objects, and no others of earlier calls, from being removed by any process."""
        names = [self.path_of(item).name for item in items]
        with self._alone():
            if not self._own_lock.is_locked:
                self._own_lock.acquire(timeout=0)
            atomic_write(self._pins / f"{self._own}.json", json.dumps(names).encode(), alone=True)

    def fetch(
        self,
        item: RemoteObject,
        copy: Callable[[int], None],
        check: Callable[[Path], None] = lambda _: None,
    ) -> Outcome:
        """Bring an object into the cache, if it is not there.

        copy: writes it to an open file. check: raises if a file is not what it should be.

        Raises what both do; DataError if the disk is full.
        """
        if self.has(item):
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

    def _cannot_write(self, error: OSError) -> DataError:
        return DataError(
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
            sizes = {}
            for path in self._shards.iterdir():
                with contextlib.suppress(OSError):
                    state = path.stat()
                    sizes[path] = state.st_size, state.st_mtime_ns
            used = sum(found for found, _ in sizes.values())
            room = min(self.limit - used, free_space(self._shards) - SPARE)
            if room < size:
                pinned = self._pinned()
                for path in sorted(sizes, key=lambda one: sizes[one][1]):
                    if self._is_free(path, pinned):
                        path.unlink(missing_ok=True)
                        room += sizes[path][0]
                        if room >= size:
                            break
            if room < size:
                if used + size <= self.limit:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
                return False
            with partial.open("wb") as file:
                file.truncate(size)
            return True

    def _is_free(self, path: Path, pinned: set[str]) -> bool:
        """Return whether nobody needs a file: a shard that is not pinned, or what a killed process left."""
        if not path.name.endswith(PARTIAL):
            return path.name not in pinned
        return _can_lock(self._locks / f"{path.name.removesuffix(PARTIAL)}.lock")

    def _pinned(self) -> set[str]:
        """Return the shards that a process keeps; forget processes that are gone."""
        names: set[str] = set()
        for path in self._pins.glob("*.json"):
            lock = self._locks / f"{path.stem}.lock"
            if path.stem != self._own and _can_lock(lock):
                for gone in (path, lock):
                    gone.unlink(missing_ok=True)
                continue
            names |= set(json.loads(path.read_bytes()))
        return names


def _can_lock(path: Path) -> bool:
    """Return whether nobody holds a lock."""
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        return False
    lock.release()
    return True

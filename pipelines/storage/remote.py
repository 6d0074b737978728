"""Objects in storage that is reached by URL: listed, read and written by fsspec's file systems, with retries.

All waiting is done by coroutines of fsspec's own thread: a request that stalls stops no other one.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import os
import random
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from pipelines.storage.errors import asked_wait, explained, is_final, status_of, words
from pipelines.utils.errors import RunError, UsageError
from pipelines.utils.output import note_once

T = TypeVar("T")

TRIES = 8  # of a request
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds before another try; together about a minute
CHUNK = 1 << 20  # bytes that are taken of a connection at a time
PART = 32 << 20  # bytes of a request: several connections are faster than one
CONNECTIONS = 16  # requests at once


@dataclass(frozen=True)
class RemoteObject:
    """An object as it was listed.

    tag: what tells that it changed: its ETag, hash or time; "" if nothing does. by_range: whether a part of
    it can be asked for. source: the address that is asked for it, where that is another one. sha256: of its
    content, "" where that is not known.
    """

    url: str
    size: int
    tag: str
    by_range: bool = True
    source: str = ""
    sha256: str = ""

    @property
    def state(self) -> str:
        """What tells its copies from those of another content; "" if nothing does."""
        return self.tag or self.sha256

    @property
    def name(self) -> str:
        """What it is called in its folder."""
        return self.url.rpartition("/")[2]


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A wait that was given up."""


class _CannotWrite(Exception):  # noqa: N818
    """The file that an object is copied to cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error


class Remote(ABC):
    """The objects of one kind of storage, by a file system of fsspec's."""

    tag: ClassVar[str] = "ETag"
    """What a listing says of an object, by which a changed one is known."""

    part: ClassVar[int] = 16 << 20
    """Bytes of a request that writes."""

    sending: ClassVar[dict[str, int]] = {}
    """More options of the file system's for writing a file."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self._opened: tuple[int, Any] | None = None

    def find(self, patterns: list[str]) -> list[list[RemoteObject]]:
        """Return the objects that match each of the patterns, sorted by name.

        Raises UsageError if a bucket is not there or access to it is denied, RunError if it does not answer.
        """
        return run(self._listed(patterns))

    def below(self, url: str) -> list[RemoteObject]:
        """Return all objects below a URL. Raises as `find`."""
        return run(self._found(url, "find"))

    def info(self, url: str) -> RemoteObject:
        """Return an object. Raises UsageError if there is none, and as `find`."""

        async def attempt() -> RemoteObject:
            return self._object(await self._call("info", self._path(url)))

        return run(self.retried(url, attempt))

    def content(self, url: str) -> bytes | None:
        """Return a small object, None if there is none. Raises as `find`."""

        async def attempt() -> bytes | None:
            try:
                whole = RemoteObject(url, 0, "", by_range=False)
                async with contextlib.aclosing(self.chunks(whole, 0, 0)) as chunks:
                    return b"".join([chunk async for chunk in chunks])
            except Exception as error:
                if self._is_missing(error):
                    return None
                raise

        return run(self.retried(url, attempt))

    def put(self, url: str, data: bytes) -> None:
        """Write a small object, at once. Raises as `find`."""
        run(self.retried(url, lambda: self.fs._pipe_file(self._path(url), data), "write"))

    def put_file(self, url: str, source: Path) -> None:
        """Write a local file to an object, at once, and verify what is stored by its hash.

        Raises as `find`; RunError, too, if what is stored is something else: then nothing is; OSError if the
        file cannot be read.
        """
        expected = checksums(source, self.part)

        async def attempt() -> None:
            path = self._path(url)
            await self.fs._put_file(str(source), path, chunksize=self.part, **self.sending)
            if not await self._holds(url, expected):
                await self.fs._rm_file(path)
                raise ConnectionError("what is stored is not what was sent")

        run(self.retried(url, attempt, "write"))

    def remove(self, url: str) -> None:
        """Delete an object, if it is there. Raises as `find`."""

        async def attempt() -> None:
            with contextlib.suppress(FileNotFoundError):
                await self.fs._rm_file(self._path(url))

        run(self.retried(url, attempt, "write"))

    def read(self, item: RemoteObject, start: int, stop: int, given_up: threading.Event) -> bytes:
        """Return bytes `start` to `stop` - 1. Raises as `copy`."""
        data = bytearray()

        async def attempt() -> None:
            async with contextlib.aclosing(self.chunks(item, start + len(data), stop)) as chunks:
                async for chunk in chunks:
                    data.extend(chunk)
            _require_all(start + len(data), stop)

        run(self.retried(item.url, attempt), given_up)
        return bytes(data)

    def copy(self, item: RemoteObject, file: int, given_up: threading.Event) -> None:
        """Write an object to an open file.

        Raises RunError if it cannot be read, or is another than was listed; UsageError if it is not there, or
        access is denied; OSError if the file cannot be written; Stopped after `given_up`.
        """
        try:
            run(self._copied(item, file), given_up)
        except _CannotWrite as failed:
            raise failed.error from None

    @property
    def fs(self) -> Any:
        """The file system, each process's own: a fork has no thread of fsspec's."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), self._open()
        return self._opened[1]

    @abstractmethod
    def _open(self) -> Any:
        """Return a file system that tells what is there now, and does not try again by itself."""

    @abstractmethod
    def chunks(self, item: RemoteObject, start: int, stop: int) -> AsyncGenerator[bytes]:
        """Yield bytes `start` to `stop` - 1, or all where `item` is not read by range.

        Raises what its library does; Changed, if the object is another than `item`, which has a tag.
        """

    def _is_missing(self, error: Exception) -> bool:
        """Return whether an error says that there is no such object."""
        return isinstance(error, FileNotFoundError) or status_of(error) in (404, 410)

    def _is_final(self, error: Exception) -> bool:
        return is_final(error)

    def _explained(self, url: str, error: Exception) -> Exception:
        return explained(url, error)

    def _path(self, url: str) -> Any:
        return self.fs._strip_protocol(url)

    async def _call(self, name: str, *args: Any, **more: Any) -> Any:
        """Call a method of the file system without blocking the thread that waits for all requests."""
        return await getattr(self.fs, f"_{name}")(*args, **more)

    async def _listed(self, patterns: list[str]) -> list[list[RemoteObject]]:
        """Return the objects of each pattern."""
        exact = len(patterns) > 1 and not any(set(one) & set("*?[") for one in patterns)
        if not exact:
            return [await self._found(one, "glob") for one in patterns]
        # For each folder one listing of what begins alike, in place of a request for each of the names.
        folders: dict[str, list[str]] = defaultdict(list)
        for one in patterns:
            folders[one.rpartition("/")[0]].append(one)
        listed = [await self._found(_beginning(its) + "*", "glob") for its in folders.values()]
        by_url = {one.url: one for its in listed for one in its}
        return [[by_url[one]] if one in by_url else [] for one in patterns]

    async def _found(self, url: str, how: str) -> list[RemoteObject]:
        """Return the objects that `find` or `glob` of the file system finds."""

        async def attempt() -> list[RemoteObject]:
            found = await self._call(how, self._path(url), detail=True)
            return [self._object(info) for info in found.values() if info["type"] == "file"]

        return await self.retried(url, attempt)

    def _object(self, info: Any) -> RemoteObject:
        tag = str(info.get(self.tag, ""))
        return RemoteObject(f"{self.scheme}://{info['name']}", int(info["size"]), tag)

    async def _holds(self, url: str, expected: Checksums) -> bool:
        """Return whether an object is what it should be: by the storage's checksum, or by reading it."""
        info = await self._call("info", self._path(url))
        if int(info["size"]) != expected.size:
            return False
        if {str(info.get("ETag", "")).strip('"'), str(info.get("md5Hash", ""))} & expected.md5:
            return True
        found = hashlib.sha256()
        async with contextlib.aclosing(self.chunks(self._object(info), 0, expected.size)) as chunks:
            async for chunk in chunks:
                found.update(chunk)
        return found.hexdigest() == expected.sha256

    async def _copied(self, item: RemoteObject, file: int) -> None:
        # Its own: who waits may be told to stop, close the file and open another under its number.
        file = os.dup(file)
        size = PART if item.by_range else max(item.size, 1)
        tasks = [
            asyncio.create_task(self._fill(item, start, min(start + size, item.size), file))
            for start in range(0, item.size, size)
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            os.close(file)

    async def _fill(self, item: RemoteObject, start: int, stop: int, file: int) -> None:
        at = start

        async def attempt() -> None:
            nonlocal at
            if not item.by_range:
                at = start
            async with contextlib.aclosing(self.chunks(item, at, stop)) as chunks:
                async for chunk in chunks:
                    try:
                        at += os.pwrite(file, chunk, at)
                    except OSError as error:
                        raise _CannotWrite(error) from None
            _require_all(at, stop)

        await self.retried(item.url, attempt)

    async def retried(self, url: str, attempt: Callable[[], Awaitable[T]], verb: str = "read") -> T:
        """Return what `attempt` returns; it is called again after an error that may be passing.

        Raises RunError after the last try; UsageError for what no other try can mend.
        """
        for number in range(1, TRIES + 1):
            try:
                async with _slots():
                    return await attempt()
            except (_CannotWrite, UsageError, RunError):
                raise
            except Exception as error:
                if self._is_final(error):
                    raise self._explained(url, error) from None
                if number == TRIES:
                    raise RunError(
                        f"cannot {verb} {url}: {TRIES} tries failed, the last one with: {words(error)}"
                    ) from error
                wait = asked_wait(error)
                if wait > LONGEST_DELAY:
                    note_once("wait", f"{url}: the storage asks to retry in {wait:.0f} s")
            longest = min(FIRST_DELAY * 2 ** (number - 1), LONGEST_DELAY)
            await asyncio.sleep(max(wait, random.uniform(longest / 2, longest)))
        raise AssertionError


def _beginning(names: Collection[str]) -> str:
    """Return what all names begin with."""
    pairs = zip(min(names), max(names), strict=False)
    return "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def run(work: Coroutine[Any, Any, T], given_up: threading.Event | None = None) -> T:
    """Return what a coroutine returns, which fsspec's thread runs. Raises what it does; Stopped."""
    import fsspec.asyn

    task = asyncio.run_coroutine_threadsafe(work, fsspec.asyn.get_loop())
    try:
        while not concurrent.futures.wait([task], timeout=0.2).done:
            if given_up is not None and given_up.is_set():
                raise Stopped
        return task.result()
    finally:
        task.cancel()


@functools.cache
def _slots_of(_process: int) -> asyncio.Semaphore:
    return asyncio.Semaphore(CONNECTIONS)


def _slots() -> asyncio.Semaphore:
    return _slots_of(os.getpid())


class Checksums(NamedTuple):
    """Of a file. md5: what S3, of one part or several, and Google Cloud Storage give."""

    size: int
    sha256: str
    md5: set[str]


def checksums(path: Path, part: int) -> Checksums:
    """Return a file's; part: bytes of a request that sends it."""
    sha256, whole, parts = hashlib.sha256(), hashlib.md5(usedforsecurity=False), []
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(part):
            size += len(chunk)
            sha256.update(chunk)
            whole.update(chunk)
            parts.append(hashlib.md5(chunk, usedforsecurity=False).digest())
    of_parts = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    md5 = {
        whole.hexdigest(),
        f"{of_parts}-{len(parts)}",
        base64.b64encode(whole.digest()).decode(),
    }
    return Checksums(size, sha256.hexdigest(), md5)


def _require_all(at: int, stop: int) -> None:
    """Raise ConnectionError if a body was not as long as it should be."""
    if at != stop:
        raise ConnectionError(f"the answer ended {stop - at} bytes early")

"""Objects in storage that is reached by URL: listed and read by fsspec's file systems, with retries.

All waiting is done by coroutines of fsspec's own thread: a request that stalls stops no other one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import os
import random
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines.utils.errors import RunError, UsageError, first_line

T = TypeVar("T")

TRIES = 8  # of a request
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds before another try; together about a minute
STALL = 30.0  # seconds without a byte after which a request is tried again
CHUNK = 1 << 20  # bytes that are taken of a connection at a time
PART = 32 << 20  # bytes of a request: several connections are faster than one
CONNECTIONS = 16  # requests at once
ONCE_MORE = (408, 425, 429)  # of the client's errors, those that another try may not meet

NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}


@dataclass(frozen=True)
class RemoteObject:
    """An object as it was listed.

    tag: what tells that it changed: its ETag, hash or time; "" if nothing does. by_range: whether a part of
    it can be asked for.
    """

    url: str
    size: int
    tag: str
    by_range: bool = True

    @property
    def name(self) -> str:
        """What it is called in its folder."""
        return self.url.rpartition("/")[2]


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A wait that was given up."""


class Changed(Exception):  # noqa: N818
    """The object is no longer what was listed."""


class _CannotWrite(Exception):  # noqa: N818
    """The file that an object is copied to cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error


class Remote:
    """The objects of one kind of storage, by any file system of fsspec's."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.writes = scheme in ("s3", "gs")  # a file on the Hugging Face hub would be a commit
        self._opened: tuple[int, Any] | None = None

    def find(self, patterns: list[str]) -> list[list[RemoteObject]]:
        """Return the objects that match each of the patterns, sorted by name.

        Raises UsageError if a bucket is not there or access to it is denied, RunError if it does not answer.
        """
        return run(self._listed(patterns))

    def content(self, url: str) -> bytes | None:
        """Return a small object, None if there is none."""
        return run(self.retried(url, functools.partial(self._whole, url)))

    def put(self, url: str, data: bytes) -> None:
        """Write a small object. Raises OSError, UsageError or RunError."""
        run(self.retried(url, lambda: self.fs._pipe_file(self._path(url), data)))

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

    def _open(self) -> Any:
        import fsspec

        return fsspec.filesystem(self.scheme, use_listings_cache=False, skip_instance_cache=True)

    def _path(self, url: str) -> Any:
        return self.fs._strip_protocol(url)

    async def _call(self, name: str, *args: Any, **more: Any) -> Any:
        """Call a method of the file system, without waiting if it has such a one."""
        if self.fs.async_impl:
            return await getattr(self.fs, f"_{name}")(*args, **more)
        return await asyncio.to_thread(getattr(self.fs, name), *args, **more)

    async def _listed(self, patterns: list[str]) -> list[list[RemoteObject]]:
        """Return the objects of each pattern."""
        exact = len(patterns) > 1 and not any(set(one) & set("*?[") for one in patterns)
        if not exact:
            return [await self._matching(one) for one in patterns]
        # One listing of what begins alike, in place of a request for each of the names.
        first, last = min(patterns), max(patterns)
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        listed = await self._matching("".join(one for one, _ in alike) + "*")
        by_url = {one.url: one for one in listed}
        return [[by_url[one]] if one in by_url else [] for one in patterns]

    async def _matching(self, pattern: str) -> list[RemoteObject]:
        async def attempt() -> list[RemoteObject]:
            found = await self._call("glob", self._path(pattern), detail=True)
            return [self._object(info) for info in found.values() if info["type"] == "file"]

        return await self.retried(pattern, attempt)

    def _object(self, info: Any) -> RemoteObject:
        names = ("ETag", "etag", "blob_id", "md5Hash", "generation", "mtime", "last_modified")
        tag = next((str(info[name]) for name in names if info.get(name)), "")
        return RemoteObject(f"{self.scheme}://{info['name']}", int(info["size"]), tag)

    async def _whole(self, url: str) -> bytes | None:
        try:
            data: bytes = await self._call("cat_file", self._path(url))
        except FileNotFoundError:
            return None
        return data

    async def chunks(self, item: RemoteObject, start: int, stop: int) -> AsyncGenerator[bytes]:
        """Yield bytes `start` to `stop` - 1. Raises what its library does; Changed."""
        yield await self._call("cat_file", self._path(item.url), start=start, end=stop)

    async def _require_same(self, item: RemoteObject) -> None:
        """Raise Changed if the object is another than was listed."""
        if self._object(await self._call("info", self._path(item.url))).tag != item.tag:
            raise Changed

    async def _copied(self, item: RemoteObject, file: int) -> None:
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
        await self.retried(item.url, lambda: self._require_same(item))

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

    async def retried(self, url: str, attempt: Callable[[], Awaitable[T]]) -> T:
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
                _raise_if_final(url, self.scheme, error)
                if number == TRIES:
                    raise RunError(
                        f"cannot read {url}: {TRIES} tries failed, the last one with: {_words(error)}"
                    ) from error
            longest = min(FIRST_DELAY * 2 ** (number - 1), LONGEST_DELAY)
            await asyncio.sleep(random.uniform(longest / 2, longest))
        raise AssertionError


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


def _require_all(at: int, stop: int) -> None:
    """Raise ConnectionError if a body was not as long as it should be."""
    if at != stop:
        raise ConnectionError(f"the answer ended {stop - at} bytes early")


def _raise_if_final(url: str, scheme: str, error: Exception) -> None:
    """Raise what ends a command for an error that another try would meet again."""
    status = _status(error)
    kinds = {type(one).__name__ for one in (error, error.__cause__)}
    if status == 412 or isinstance(error, Changed):
        raise RunError(
            f"{url} has changed since the training began to read it; start again, when it no longer does"
        ) from None
    if kinds & NO_CREDENTIALS:
        raise UsageError(f"{url}: {first_line(error)}; {_CREDENTIALS[scheme]}") from None
    if isinstance(error, PermissionError) or status in (401, 403):
        raise UsageError(
            f"{url}: access is denied ({first_line(error)}); {_CREDENTIALS[scheme]}"
        ) from None
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        raise UsageError(f"{url}: there is no such object, or bucket") from None
    if (status is not None and 400 <= status < 500 and status not in ONCE_MORE) or isinstance(
        error, ValueError | TypeError
    ):
        raise UsageError(f"{url}: {_words(error)}") from None


_CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true",
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "run hf auth login, or set HF_TOKEN",
    "http": "put name and password into ~/.netrc",
    "https": "put name and password into ~/.netrc",
}


def _status(error: BaseException) -> int | None:
    """Return the status of the HTTP answer that an error is about, if any."""
    for one in (error, error.__cause__):
        answer = getattr(one, "response", None)
        found: Any = None
        if isinstance(answer, dict):
            found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for value in (
            found,
            getattr(one, "status", None),
            getattr(one, "code", None),
            getattr(answer, "status_code", None),
        ):
            if isinstance(value, int):
                return value
    return None


def _words(error: Exception) -> str:
    """Return what an error says, with its status."""
    status = _status(error)
    text = first_line(error)
    if isinstance(error, asyncio.TimeoutError) and not str(error):
        text = f"no byte came for {STALL:g} s"
    return text if status is None or str(status) in text else f"{status} {text}"

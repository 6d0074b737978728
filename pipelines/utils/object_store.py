"""A folder of objects, such as s3://bucket/folder: written, verified and read, with retries.

Credentials come from the usual environment alone.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipelines.utils.atomic_io import sha256_file
from pipelines.utils.errors import RunError, UsageError, first_line
from pipelines.utils.urls import SCHEMES

T = TypeVar("T")

TRIES = 5  # of a request
FIRST_DELAY = 0.5  # seconds before the second; it doubles
PART = 16 << 20  # bytes of a request, of which four are sent at once
_NO_ACCESS = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError")


class ObjectStore:
    """The objects below a URL, by their names there.

    All methods raise UsageError where another try would not help (no such bucket, no access), RunError if
    the storage does not answer, OSError of a local file.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        scheme, _, self._root = url.partition("://")
        if scheme not in SCHEMES or not self._root:
            known = " or ".join(f"{s}://BUCKET/FOLDER" for s in SCHEMES)
            raise UsageError(f"{url}: a URL of object storage is {known}")
        importlib.import_module(SCHEMES[scheme])
        import fsspec

        # A client that tells what is there now, and does not try again by itself.
        options: dict[str, Any] = {"use_listings_cache": False}
        if scheme == "s3":
            retries = {"max_attempts": 0}
            options["config_kwargs"] = {
                "connect_timeout": 10,
                "read_timeout": 60,
                "retries": retries,
            }
        self._fs: Any = fsspec.filesystem(scheme, **options)
        self._fs.retries = 1

    def list(self) -> list[str]:
        """Return the names of all objects; [] if there are none."""

        def ask() -> list[str]:
            return [path.removeprefix(f"{self._root}/") for path in self._fs.find(self._root)]

        return sorted(self._tried(self.url, ask))

    def read(self, name: str) -> bytes | None:
        """Return a small object; None if there is none."""

        def ask() -> bytes | None:
            try:
                data: bytes = self._fs.cat_file(self._path(name))
                return data
            except FileNotFoundError:
                return None

        return self._tried(self._url(name), ask)

    def write(self, name: str, data: bytes) -> None:
        """Write a small object, at once."""
        self._tried(self._url(name), lambda: self._fs.pipe_file(self._path(name), data))

    def get(self, name: str, target: Path) -> None:
        """Write an object to a local file, which may be left incomplete."""
        self._tried(self._url(name), lambda: self._fs.get_file(self._path(name), str(target)))

    def put(self, name: str, source: Path) -> None:
        """Write a local file to an object, at once, and verify what is stored by its hash.

        Raises RunError, too, if what is stored is something else; then nothing is.
        """
        options = {"chunksize": PART}
        if self.url.startswith("s3:"):
            options["max_concurrency"] = 4

        def send() -> None:
            self._fs.put_file(str(source), self._path(name), **options)
            if not self._holds(name, source):
                self._fs.rm_file(self._path(name))
                raise ValueError("what is stored is not what was sent")

        with source.open("rb"):  # an error of the local file is not the storage's
            self._tried(self._url(name), send)

    def remove(self, name: str) -> None:
        """Delete an object, if it is there."""

        def ask() -> None:
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

        self._tried(self._url(name), ask)

    def _holds(self, name: str, source: Path) -> bool:
        """Return whether an object is as the file: by the storage's checksum, or else by reading it."""
        info = self._fs.info(self._path(name))
        if info["size"] != source.stat().st_size:
            return False
        told = {str(info.get("ETag", "")).strip('"'), str(info.get("md5Hash", ""))}
        if told & _md5s(source):
            return True
        found = hashlib.sha256()
        with self._fs.open(self._path(name), "rb") as file:
            while chunk := file.read(PART):
                found.update(chunk)
        return found.hexdigest() == sha256_file(source)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _tried(self, what: str, ask: Callable[[], T]) -> T:
        for attempt in range(TRIES):
            try:
                return ask()
            except Exception as error:
                name = type(error).__name__
                if isinstance(error, FileNotFoundError):
                    raise UsageError(f"{what}: there is no such bucket or object") from error
                if isinstance(error, PermissionError) or name in _NO_ACCESS:
                    raise UsageError(
                        f"{what}: access is denied ({first_line(error)}); give credentials by the usual "
                        "environment"
                    ) from error
                if attempt == TRIES - 1:
                    raise RunError(f"{what}: {first_line(error)}") from error
            time.sleep(FIRST_DELAY * 2**attempt * random.uniform(0.5, 1))
        raise AssertionError


def _md5s(path: Path) -> set[str]:
    """Return what S3, of one part or several, and Google Cloud Storage give as a checksum."""
    whole, parts = hashlib.md5(usedforsecurity=False), []
    with path.open("rb") as file:
        while chunk := file.read(PART):
            whole.update(chunk)
            parts.append(hashlib.md5(chunk, usedforsecurity=False).digest())
    of_parts = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    return {
        whole.hexdigest(),
        f"{of_parts}-{len(parts)}",
        base64.b64encode(whole.digest()).decode(),
    }

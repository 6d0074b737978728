"""A folder of objects, such as s3://bucket/folder: written, verified and read."""

from __future__ import annotations

import threading
from pathlib import Path

from pipelines.storage.kinds import remote_of
from pipelines.utils.location import Url, require_writable


class ObjectStore:
    """The objects below a URL, by their names there.

    All methods raise UsageError where another try would not help (no such bucket, no access), RunError if
    the storage does not answer, OSError of a local file.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        require_writable(Url(url))
        self._remote = remote_of(url)

    def list(self) -> list[str]:
        """Return the names of all objects; [] if there are none."""
        return sorted(
            item.url.removeprefix(f"{self.url}/") for item in self._remote.below(self.url)
        )

    def read(self, name: str) -> bytes | None:
        """Return a small object; None if there is none."""
        return self._remote.content(self._url(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a small object, at once."""
        self._remote.put(self._url(name), data)

    def get(self, name: str, target: Path) -> None:
        """Write an object to a local file, which may be left incomplete."""
        item = self._remote.info(self._url(name))
        target.unlink(missing_ok=True)  # which may be a link to a checkpoint
        with target.open("wb") as file:
            self._remote.copy(item, file.fileno(), threading.Event())

    def put(self, name: str, source: Path) -> None:
        """Write a local file to an object, at once, and verify what is stored by its hash.

        Raises RunError, too, if what is stored is something else; then nothing is.
        """
        self._remote.put_file(self._url(name), source)

    def remove(self, name: str) -> None:
        """Delete an object, if it is there."""
        self._remote.remove(self._url(name))

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}"

"""A web server of files on localhost, as good or as bad as its headers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from tests.helpers.storage_server import StorageHandler, StorageServer


class WebServer(StorageServer):
    """files: by name. has_ranges: whether it sends parts of them. tag: the header that tells a change."""

    def __init__(self, has_ranges: bool = True, tag: str = "ETag") -> None:
        self.files: dict[str, bytes] = {}
        self.has_ranges, self.tag = has_ranges, tag
        super().__init__(_Handler)


class _Handler(StorageHandler):
    server: WebServer

    def routes(self) -> list[tuple[str, str, Callable[..., None]]]:
        return [("GET", "/(?P<name>.+)", self._file)]

    def fail(self, status: int, message: str) -> None:
        self.send(message.encode(), status)

    def _file(self, name: str) -> None:
        if (data := self.server.files.get(name)) is None:
            self.fail(404, "not found")
            return
        tag = {self.server.tag: f'"{hashlib.md5(data).hexdigest()}"'} if self.server.tag else {}
        if self.server.has_ranges:
            self.send_part(data, tag)
        else:
            self.send(data, 200, tag)

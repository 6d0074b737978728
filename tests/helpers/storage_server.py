"""What servers of object storage on localhost share, with faults that a test puts between."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit


@dataclass
class Fault:
    """What happens to the requests of a kind, so many times.

    method, key: a request's, of which the key ends so. status: answered in place of the object's, such as
    503. delay: seconds before the answer. cut: bytes of the body that are sent before the connection ends.
    """

    method: str = "GET"
    key: str = ""
    status: int | None = None
    delay: float = 0
    cut: int | None = None
    times: int = 1


class Faults(list[Fault]):
    """Those that are still to happen."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def take(self, method: str, path: str) -> Fault | None:
        """The one that happens to a request, if any."""
        with self._lock:
            for fault in self:
                if fault.times and method == fault.method and path.endswith(fault.key):
                    fault.times -= 1
                    return fault
        return None


def below(names: Iterable[str], prefix: str, delimiter: str) -> tuple[list[str], list[str]]:
    """The names that begin with a prefix: files, and the folders of those with a delimiter after it."""
    files, folders = [], set()
    for name in sorted(names):
        if name.startswith(prefix):
            first, is_folder, _ = name.removeprefix(prefix).partition(delimiter)
            if is_folder:
                folders.add(prefix + first)
            else:
                files.append(name)
    return files, sorted(folders)


class StorageServer(ThreadingHTTPServer):
    """requests: their methods and paths."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, handler: type[StorageHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.requests: list[str] = []
        self.faults = Faults()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class StorageHandler(BaseHTTPRequestHandler):
    """query, body: of the request."""

    protocol_version = "HTTP/1.1"
    cut: int | None = None

    def routes(self) -> list[tuple[str, str, Callable[..., None]]]:
        """Methods, pattern of the path, and what takes its groups."""
        raise NotImplementedError

    def fail(self, status: int, message: str) -> None:
        """Send an error."""
        raise NotImplementedError

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.path, self.query = unquote(parts.path), dict(parse_qsl(parts.query))
        self.body = self._read_body()
        self.server.requests.append(f"{self.command} {self.path}")
        fault = self.server.faults.take(self.command, self.path)
        self.cut = fault.cut if fault else None
        if fault:
            time.sleep(fault.delay)
            if fault.status:
                self.fail(fault.status, "a fault")
                return
        for known, pattern, act in self.routes():
            found = re.fullmatch(pattern, parts.path)
            if found and self.command in known.split("|"):
                act(**{name: value and unquote(value) for name, value in found.groupdict().items()})
                return
        self.fail(404, f"nothing at {self.path}")

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send_part(self, data: bytes, headers: dict | None = None) -> None:
        """Send the range that is asked for, or all."""
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            part = data[int(asked[1]) : int(asked[2]) + 1]
            last = int(asked[1]) + len(part) - 1
            place = {"Content-Range": f"bytes {asked[1]}-{last}/{len(data)}"}
            self.send(part, 206, place | (headers or {}))
        else:
            self.send(data, 200, headers)

    def send(self, content: object, status: int = 200, headers: dict | None = None) -> None:
        """Send bytes, or anything else as JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for key, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.cut is not None:
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(data[: self.cut])

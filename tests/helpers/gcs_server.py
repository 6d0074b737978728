"""Google Cloud Storage on localhost: as much of its JSON interface as gcsfs calls, with faults in between."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable

from tests.helpers.storage_server import StorageHandler, StorageServer, below

BUCKET = "bucket"
DATE = "2026-01-02T03:04:05.678Z"


class GcsServer(StorageServer):
    """One bucket. objects: by name, the generation and the bytes of each."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.uploads: list[tuple[str, bytearray]] = []
        super().__init__(_Handler)

    def put(self, name: str, data: bytes) -> None:
        newest = max((generation for generation, _ in self.objects.values()), default=1000)
        self.objects[name] = newest + 1, data


class _Handler(StorageHandler):
    server: GcsServer

    def fail(self, status: int, message: str) -> None:
        self.send({"error": {"code": status, "message": message}}, status)

    def routes(self) -> list[tuple[str, str, Callable[..., None]]]:
        name = r"(?P<name>[^/]+)"
        return [
            ("GET", f"/storage/v1/b/{BUCKET}/o", self._list),
            ("GET", f"/storage/v1/b/{BUCKET}/o/{name}", self._info),
            ("GET", f"/download/storage/v1/b/{BUCKET}/o/{name}", self._read),
            ("DELETE", f"/storage/v1/b/{BUCKET}/o/{name}", self._delete),
            ("POST", f"/upload/storage/v1/b/{BUCKET}/o", self._upload),
            ("POST", r"/uploads/(?P<number>\d+)", self._chunk),
            ("DELETE", r"/uploads/(?P<number>\d+)", self._cancel),
        ]

    def _about(self, name: str) -> dict[str, str]:
        generation, data = self.server.objects[name]
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        about = {"name": name, "bucket": BUCKET, "size": str(len(data)), "md5Hash": md5}
        about |= {"generation": str(generation), "etag": f"C{generation}=", "updated": DATE}
        return about | {"timeCreated": DATE, "kind": "storage#object"}

    def _object(self, name: str) -> tuple[int, bytes] | None:
        """An object, or None after an error was sent."""
        found = self.server.objects.get(name)
        if found is None:
            self.fail(404, f"No such object: {BUCKET}/{name}")
        return found

    def _list(self) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "\0")
        files, folders = below(self.server.objects, prefix, delimiter)
        found = {"items": [*map(self._about, files)], "prefixes": [f"{one}/" for one in folders]}
        self.send({"kind": "storage#objects"} | found)

    def _info(self, name: str) -> None:
        if self._object(name):
            self.send(self._about(name))

    def _read(self, name: str) -> None:
        if found := self._object(name):
            generation, data = found
            if self.query.get("ifGenerationMatch", str(generation)) != str(generation):
                self.fail(412, "At least one of the pre-conditions you specified did not hold.")
            else:
                self.send_part(data)

    def _delete(self, name: str) -> None:
        if self._object(name):
            del self.server.objects[name]
            self.send(b"", 204)

    def _upload(self) -> None:
        if self.query["uploadType"] == "resumable":
            self.server.uploads.append((json.loads(self.body)["name"], bytearray()))
            number = len(self.server.uploads) - 1
            self.send({}, 200, {"Location": f"{self.server.url}/uploads/{number}"})
            return
        boundary = re.search("boundary=['\"]?([^'\"]+)", self.headers["Content-Type"])[1]
        _, about, content, _ = self.body.split(f"--{boundary}".encode())
        name = json.loads(about.partition(b"\n\n")[2])["name"]
        self.server.put(name, content.partition(b"\n\n")[2].removesuffix(b"\n"))
        self.send(self._about(name))

    def _chunk(self, number: str) -> None:
        name, data = self.server.uploads[int(number)]
        first, last, size = re.fullmatch(
            r"bytes (\d+)-(\d+)/(\d+)", self.headers["Content-Range"]
        ).groups()
        assert (int(first), int(last)) == (len(data), len(data) + len(self.body) - 1)
        data += self.body
        if len(data) < int(size):
            self.send(b"", 308, {"Range": f"bytes=0-{len(data) - 1}"})
        else:
            self.server.put(name, bytes(data))
            self.send(self._about(name))

    def _cancel(self, number: str) -> None:
        self.server.uploads[int(number)][1].clear()
        self.send(b"", 499)

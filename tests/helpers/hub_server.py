"""A Hugging Face hub on localhost: as much of its interface as releases and reading data sets need.

Seen from huggingface_hub's own client. What it assumes of the real one: large files go by git-LFS where
hf_xet is not used, a commit is one request, a file's ETag is the hash of its content, and errors have an
X-Error-Code. Data sets are in `repositories` by datasets/OWNER/NAME; their files come by range from another
host, to which it redirects.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

from tests.helpers.storage_faults import Faults

TOKEN, USER = "hf_" + "a" * 30, "me"

Files = dict[str, bytes]


@dataclass
class Repository:
    """commits: by hash, the files of each, the newest last."""

    commits: dict[str, Files] = field(default_factory=dict)
    is_private: bool = False
    is_gated: bool = False

    def commit(self, files: Files) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def resolve(self, revision: str) -> str | None:
        newest = list(self.commits)[-1]
        return newest if revision == "main" else revision if revision in self.commits else None


class HubServer(ThreadingHTTPServer):
    """is_down: every request is answered by an error of the server. requests: their methods and paths."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[str] = []
        self.is_down = False
        self.faults = Faults()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer
    cut: int | None = None

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def _answer(self, method: str) -> None:
        self.path = unquote(urlsplit(self.path).path)
        self.body = self._read_body()
        self.server.requests.append(f"{method} {self.path}")
        if self.server.is_down:
            self._error(503, "", "out for lunch")
            return
        fault = self.server.faults.take(method, self.path)
        self.cut = fault.cut if fault else None
        if fault:
            time.sleep(fault.delay)
            if fault.status:
                self._error(fault.status, "", "a fault", {"Retry-After": "0"})
                return
        name = r"(?P<name>[^/]+/[^/]+)"
        data = r"(?P<name>datasets/[^/]+/[^/]+)"
        for known, pattern, act in (
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._validate),
            ("PUT", "/large/(?P<oid>[0-9a-f]{64})", self._store),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            ("POST", rf"/api/models/{name}/preupload/(?P<revision>.+)", self._preupload),
            ("POST", rf"/api/models/{name}/commit/(?P<revision>.+)", self._commit),
            ("GET", rf"/api/models/{name}/revision/(?P<revision>.+)", self._info),
            ("GET", rf"/api/models/{name}/tree/(?P<revision>.+)", self._tree),
            ("GET", rf"/api/{data}(/revision/(?P<revision>.+))?", self._info),
            ("GET", rf"/api/{data}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", self._folder),
            ("GET", rf"/{data}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._redirect),
            ("GET", r"/elsewhere/(?P<name>.+)/(?P<revision>[0-9a-f]{40})/(?P<file>.+)", self._part),
            ("HEAD|GET", rf"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._file),
        ):
            found = re.fullmatch(pattern, self.path)
            if found and method in known.split("|"):
                act(**found.groupdict())
                return
        self._error(404, "", f"nothing at {self.path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, writes: bool = False) -> Repository | None:
        """The repository, or None after an error was sent."""
        found = self.server.repositories.get(name)
        if found is None or (found.is_private and not self._is_known):
            self._error(404 if self._is_known else 401, "RepoNotFound", "Repository not found")
            return None
        if found.is_gated and not self._is_known:
            self._error(401, "GatedRepo", "Access to this model is restricted")
            return None
        if writes and not self._is_known:
            self._error(401, "", "Invalid username or password.")
            return None
        return found

    def _at(self, name: str, revision: str) -> tuple[str, Files] | None:
        repository = self._repository(name)
        if repository is None:
            return None
        if (oid := repository.resolve(revision)) is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return oid, repository.commits[oid]

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not self._is_known:
            self._error(401, "", "Invalid username or password.")
        elif not name.startswith(f"{USER}/"):
            self._error(403, "", "You don't have the rights to create a model under this namespace")
        elif name in self.server.repositories:
            url = f"{self.server.url}/{name}"
            self._send({"error": "You already created this model repo", "url": url}, 409)
        else:
            self.server.repositories[name] = Repository()
            self.server.repositories[name].commit({".gitattributes": b""})
            self._send({"url": f"{self.server.url}/{name}", "id": name})

    def _validate(self) -> None:
        text = json.loads(self.body)["content"]
        try:
            front = yaml.safe_load(text.split("---\n", 2)[1])
            assert isinstance(front["license"], str)
            for model in front.get("model-index", ()):
                for result in model["results"]:
                    assert result["task"]["type"]
                    assert result["dataset"]["type"]
                    assert result["dataset"]["name"]
                    assert all("type" in m and "value" in m for m in result["metrics"])
        except (LookupError, TypeError, AssertionError, yaml.YAMLError) as error:
            self._send({"errors": [{"message": f"wrong: {error}"}], "warnings": []}, 400)
        else:
            self._send({"errors": [], "warnings": []})

    def _preupload(self, name: str, revision: str) -> None:  # noqa: ARG002
        if self._repository(name, writes=True):
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = ("lfs" if path.endswith(".safetensors") else "regular" for path in paths)
            files = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False}
                for path, mode in zip(paths, modes, strict=True)
            ]
            self._send({"files": files})

    def _batch(self, name: str) -> None:
        if self._repository(name, writes=True):
            objects = [
                asked | {"actions": {"upload": {"href": f"{self.server.url}/large/{asked['oid']}"}}}
                for asked in json.loads(self.body)["objects"]
            ]
            self._send({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large[oid] = self.body
        self._send({})

    def _commit(self, name: str, revision: str) -> None:
        assert revision == "main"
        if (repository := self._repository(name, writes=True)) is None:
            return
        files = dict(repository.commits[repository.resolve("main")])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self._send({"success": True, "commitOid": oid, "commitUrl": url})

    def _info(self, name: str, revision: str | None) -> None:
        if found := self._at(name, revision or "main"):
            oid, files = found
            siblings = [{"rfilename": path} for path in files]
            self._send({"id": name, "sha": oid, "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        if found := self._at(name, revision):
            files = [
                {"type": "file", "path": path, "size": len(data), "oid": _hash(data)}
                for path, data in found[1].items()
            ]
            self._send(files)

    def _folder(self, name: str, revision: str, folder: str | None) -> None:
        if not (found := self._at(name, revision)):
            return
        below = f"{folder}/" if folder else ""
        entries: dict[str, dict] = {}
        for path, data in found[1].items():
            if path.startswith(below):
                first, is_folder, _ = path.removeprefix(below).partition("/")
                entry = {"type": "directory", "size": 0, "oid": _hash(first.encode())}
                if not is_folder:
                    entry = {"type": "file", "size": len(data), "oid": _hash(data)}
                entries[first] = {"path": below + first, **entry}
        if entries:
            self._send(list(entries.values()))
        else:
            self._error(404, "EntryNotFound", f"{folder} does not exist on {revision}")

    def _redirect(self, name: str, revision: str, file: str) -> None:
        if found := self._at(name, revision):
            oid, files = found
            if file not in files:
                self._error(404, "EntryNotFound", "Entry not found")
                return
            host = f"http://localhost:{self.server.server_port}"
            headers = {"X-Repo-Commit": oid, "X-Linked-Etag": f'"{_hash(files[file])}"'}
            self._send({}, 302, headers | {"Location": f"{host}/elsewhere/{name}/{oid}/{file}"})

    def _part(self, name: str, revision: str, file: str) -> None:
        assert not self.headers.get("Authorization"), "the hub's token, sent to another host"
        data = self.server.repositories[name].commits[revision][file]
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            part = data[int(asked[1]) : int(asked[2]) + 1]
            last = int(asked[1]) + len(part) - 1
            self._send(part, 206, {"Content-Range": f"bytes {asked[1]}-{last}/{len(data)}"})
        else:
            self._send(data)

    def _file(self, name: str, revision: str, file: str) -> None:
        if found := self._at(name, revision):
            oid, files = found
            if file not in files:
                self._error(404, "EntryNotFound", "Entry not found")
                return
            headers = {"X-Repo-Commit": oid, "ETag": f'"{_hash(files[file])}"'}
            self._send(files[file], 200, headers)

    def _error(self, status: int, code: str, message: str, more: dict | None = None) -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._send(
            {"error": message}, status, {**headers, **(more or {}), "X-Error-Message": message}
        )

    def _send(self, content: object, status: int = 200, headers: dict | None = None) -> None:
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


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

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
from collections.abc import Callable
from dataclasses import dataclass, field

import yaml

from tests.helpers.storage_server import StorageHandler, StorageServer, below

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


class HubServer(StorageServer):
    """is_down: every request is answered by an error of the server."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.is_down = False
        super().__init__(_Handler)


class _Handler(StorageHandler):
    server: HubServer

    def fail(self, status: int, message: str) -> None:
        self._error(status, "", message, {"Retry-After": "0"})

    def routes(self) -> list[tuple[str, str, Callable[..., None]]]:
        if self.server.is_down:
            return [(self.command, ".*", lambda: self.fail(503, "out for lunch"))]
        name = r"(?P<name>[^/]+/[^/]+)"
        data = r"(?P<name>datasets/[^/]+/[^/]+)"
        return [
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
        ]

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
            self.send({"error": "You already created this model repo", "url": url}, 409)
        else:
            self.server.repositories[name] = Repository()
            self.server.repositories[name].commit({".gitattributes": b""})
            self.send({"url": f"{self.server.url}/{name}", "id": name})

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
            self.send({"errors": [{"message": f"wrong: {error}"}], "warnings": []}, 400)
        else:
            self.send({"errors": [], "warnings": []})

    def _preupload(self, name: str, revision: str) -> None:  # noqa: ARG002
        if self._repository(name, writes=True):
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = ("lfs" if path.endswith(".safetensors") else "regular" for path in paths)
            files = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False}
                for path, mode in zip(paths, modes, strict=True)
            ]
            self.send({"files": files})

    def _batch(self, name: str) -> None:
        if self._repository(name, writes=True):
            objects = [
                asked | {"actions": {"upload": {"href": f"{self.server.url}/large/{asked['oid']}"}}}
                for asked in json.loads(self.body)["objects"]
            ]
            self.send({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large[oid] = self.body
        self.send({})

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
        self.send({"success": True, "commitOid": oid, "commitUrl": url})

    def _info(self, name: str, revision: str | None) -> None:
        if found := self._at(name, revision or "main"):
            oid, files = found
            siblings = [{"rfilename": path} for path in files]
            self.send({"id": name, "sha": oid, "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        if found := self._at(name, revision):
            self.send([_about(path, data) for path, data in found[1].items()])

    def _folder(self, name: str, revision: str, folder: str | None) -> None:
        if not (found := self._at(name, revision)):
            return
        files, folders = below(found[1], f"{folder}/" if folder else "", "/")
        entries = [_about(path, found[1][path]) for path in files]
        entries += [
            _about(path, path.encode()) | {"type": "directory", "size": 0} for path in folders
        ]
        if entries:
            self.send(entries)
        else:
            self._error(404, "EntryNotFound", f"{folder} does not exist on {revision}")

    def _entry(self, name: str, revision: str, file: str) -> tuple[str, bytes] | None:
        """The commit and a file of it, or None after an error was sent."""
        if not (found := self._at(name, revision)):
            return None
        oid, files = found
        if file not in files:
            self._error(404, "EntryNotFound", "Entry not found")
            return None
        return oid, files[file]

    def _redirect(self, name: str, revision: str, file: str) -> None:
        if found := self._entry(name, revision, file):
            oid, data = found
            host = f"http://localhost:{self.server.server_port}"
            headers = {"X-Repo-Commit": oid, "X-Linked-Etag": f'"{_hash(data)}"'}
            self.send({}, 302, headers | {"Location": f"{host}/elsewhere/{name}/{oid}/{file}"})

    def _part(self, name: str, revision: str, file: str) -> None:
        assert not self.headers.get("Authorization"), "the hub's token, sent to another host"
        data = self.server.repositories[name].commits[revision][file]
        self.send_part(data)

    def _file(self, name: str, revision: str, file: str) -> None:
        if found := self._entry(name, revision, file):
            oid, data = found
            self.send(data, 200, {"X-Repo-Commit": oid, "ETag": f'"{_hash(data)}"'})

    def _error(self, status: int, code: str, message: str, more: dict | None = None) -> None:
        headers = {"X-Error-Code": code} if code else {}
        self.send(
            {"error": message}, status, {**headers, **(more or {}), "X-Error-Message": message}
        )


def _about(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": _hash(data)}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

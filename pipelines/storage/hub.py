"""Data sets and other repositories on the Hugging Face hub, and what it means when it refuses something."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import warnings
import weakref
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from pipelines.storage import errors
from pipelines.storage.remote import CHUNK, Remote, RemoteObject
from pipelines.utils.errors import RunError, UsageError, first_line

LOGIN = "log in by `hf auth login`, or set HF_TOKEN"


class _Opened(NamedTuple):
    """files: huggingface_hub's file system. client: for requests that block no thread."""

    files: Any
    client: Any


class Hub(Remote):
    """Repositories, read at the commit that their branch had when they were listed.

    They are listed by huggingface_hub's file system; its reads know neither of ranges that stall nor of files
    that change.
    """

    def _open(self) -> _Opened:
        hub = library()
        client = hub.utils.get_async_session()
        weakref.finalize(self, _close, client, os.getpid()).atexit = False
        return _Opened(hub.HfFileSystem(skip_instance_cache=True), client)

    async def _call(self, name: str, *args: Any, **more: Any) -> Any:
        return await asyncio.to_thread(getattr(self, f"_{name}"), *args, **more)

    def _path(self, url: str) -> str:
        return url.removeprefix("hf://")

    def _glob(self, path: str, detail: bool) -> dict[str, Any]:  # noqa: ARG002
        """Return what lies at a path as it is now, by name; source: its address in the commit of now."""
        files = self.fs.files
        with quiet():
            files.invalidate_cache()
            where = self._resolved(path)
            root = where.unresolve().removesuffix(f"/{where.path_in_repo}")
            commit = (
                library()
                .HfApi()
                .repo_info(where.repo_id, repo_type=where.repo_type, revision=where.revision)
                .sha
            )
            pinned = f"{root.partition('@')[0]}@{commit}"
            found = files.glob(f"{pinned}/{where.path_in_repo}", detail=True)
        objects = {}
        for name, info in found.items():
            inner = name.removeprefix(f"{pinned}/")
            objects[name] = info | {
                "name": f"{root}/{inner}",
                "source": self._address(where, inner, commit),
            }
        return objects

    def _resolved(self, path: str) -> Any:
        """Return repository, kind, revision and path. Raises UsageError for what is in no repository."""
        if path.startswith("buckets/"):
            raise UsageError(f"hf://{path}: name the shards of hf://datasets/OWNER/NAME/FOLDER")
        return self.fs.files.resolve_path(path)

    def _address(self, where: Any, path: str, revision: str) -> str:
        return str(
            library().hf_hub_url(
                where.repo_id,
                path,
                repo_type=where.repo_type,
                revision=revision,
                endpoint=self.fs.files.endpoint,
            )
        )

    def _object(self, info: Any) -> RemoteObject:
        url, size = f"hf://{info['name']}", int(info["size"])
        return RemoteObject(url, size, str(info["blob_id"]), source=info["source"])

    async def chunks(self, item: RemoteObject, start: int, stop: int) -> AsyncGenerator[bytes]:
        hub, source = library(), item.source
        if not source:
            where = await asyncio.to_thread(self._resolved, self._path(item.url))
            source = self._address(where, where.path_in_repo, where.revision)
        headers = hub.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
        if item.by_range:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        client = self.fs.client
        async with client.stream("GET", source, headers=headers, timeout=errors.STALL) as answer:
            hub.utils.hf_raise_for_status(answer)
            if item.by_range and answer.status_code != 206:
                raise ConnectionError("the server answered with another range")
            async for chunk in answer.aiter_raw(CHUNK):
                yield chunk

    def _is_final(self, error: Exception) -> bool:
        return is_offline(error) or super()._is_final(error)

    def _explained(self, url: str, error: Exception) -> Exception:
        if isinstance(error.__cause__, library().errors.HfHubHTTPError):
            error = error.__cause__  # of the file system's FileNotFoundError
        if isinstance(error, FileNotFoundError | ValueError) and errors.status_of(error) is None:
            return super()._explained(url, error)
        return explained(url, error)


def _close(client: Any, process: int) -> None:
    """Close a client in the thread that has used it, which a fork of its process does not have."""
    import fsspec.asyn

    if process == os.getpid():
        asyncio.run_coroutine_threadsafe(client.aclose(), fsspec.asyn.get_loop())


def library() -> Any:
    """Return huggingface_hub. Raises UsageError if it is not installed."""
    try:
        found = importlib.import_module("huggingface_hub")
        for part in ("constants", "errors", "utils"):  # it imports them when they are needed
            importlib.import_module(f"huggingface_hub.{part}")
    except ImportError:
        raise UsageError(
            'huggingface_hub is not installed: pip install "rsnet-trainer[hub]"'
        ) from None
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's warnings from stderr, and, where that is no terminal, its progress bars."""
    utils = library().utils
    level, has_bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    if has_bars and not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        utils.logging.set_verbosity(level)
        if has_bars:
            utils.enable_progress_bars()


def is_offline(error: Exception) -> bool:
    """Return whether the hub is not asked at all, as the user wants it."""
    hub = library()
    return isinstance(error, hub.errors.OfflineModeIsEnabled) or bool(hub.constants.HF_HUB_OFFLINE)


def explained(what: str, error: Exception) -> UsageError | RunError:
    """Return what ends a command, for an error of huggingface_hub's."""
    found = library().errors
    if isinstance(error, found.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = errors.status_of(error)
    reason = first_line(error)
    if isinstance(error, found.GatedRepoError):
        return UsageError(f"{what}: access has to be requested on its page; do so, then {LOGIN}")
    if isinstance(error, found.RevisionNotFoundError):
        return UsageError(f"{what}: there is no such revision in this repository")
    if isinstance(error, found.RepositoryNotFoundError):
        return UsageError(f"{what}: there is no such repository, or it is private: {LOGIN}")
    if status in (401, 403):
        return UsageError(
            f"{what}: the hub does not let this token do that ({_said(error)}): {LOGIN}"
        )
    if is_offline(error):
        return RunError(f"{what}: HF_HUB_OFFLINE is set, and it is not in the cache; unset it once")
    if isinstance(error, found.HFValidationError) or reason.startswith("Invalid metadata"):
        return UsageError(f"{what}: {' '.join(str(error).split())}")
    if status is not None:
        return RunError(f"{what}: the hub answers {status} ({_said(error)}); try again later")
    return RunError(f"{what}: the hub cannot be reached ({reason}); try again")


def _said(error: Exception) -> str:
    """Return the hub's own words, or else those of its library."""
    return str(getattr(error, "server_message", None) or first_line(error)).splitlines()[0]

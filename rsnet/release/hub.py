"""Releases on the Hugging Face hub, which go by hf://USER/NAME or hf://USER/NAME@REVISION."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipelines.storage.hub import LOGIN, explained, library, quiet
from pipelines.utils.errors import RunError, UsageError, first_line

Result = TypeVar("Result")

# A path has one of two slashes that follow each other.
_ADDRESS = re.compile(r"hf://?(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^@]+))?")


def is_address(source: str | Path) -> bool:
    """Return whether a release is named by its address on the hub."""
    return str(source).startswith("hf:/")


def download(address: str | Path, files: Sequence[str]) -> Path:
    """Return the folder in the hub's cache with these files of a release, if it has them.

    What is in the cache is not fetched again, and is taken where the hub cannot be reached or HF_HUB_OFFLINE
    is set. Raises UsageError if there is no such release, or not for this user; RunError if the hub does not
    answer.
    """
    found = _ADDRESS.fullmatch(str(address))
    if found is None:
        raise UsageError(
            f"{address}: an address on the hub is hf://USER/NAME or hf://USER/NAME@REVISION"
        )
    name, revision = found["name"], found["revision"]
    hub = library()
    folder = Path(
        _asked(
            f"hf://{name}" + (f"@{revision}" if revision else ""),
            lambda: hub.snapshot_download(name, revision=revision, allow_patterns=list(files)),
        )
    )
    if not any((folder / file).is_file() for file in files):
        raise UsageError(f"hf://{name}: there is no release in this repository")
    return folder


def require_pushable(name: str) -> None:
    """Raise UsageError if a release cannot be pushed to `name`, as far as that is known here."""
    hub = library()
    if name.count("/") != 1:
        raise UsageError(f"--push {name}: give USER/NAME, a repository on the hub")
    try:
        hub.utils.validate_repo_id(name)
    except hub.errors.HFValidationError as error:
        raise UsageError(
            f"--push {name}: the hub takes no such name ({first_line(error)})"
        ) from error
    if hub.constants.HF_HUB_OFFLINE:
        raise UsageError("--push: HF_HUB_OFFLINE is set; unset it")
    if not hub.get_token():
        raise UsageError(f"--push: there is no token for the hub: {LOGIN}")


def push(contents: Mapping[str, bytes | Path | None], name: str, message: str) -> str:
    """Commit files, by their names, to the repository `name`, which is made if there is none.

    contents: None for a file that shall not be there.

    Returns the hash of the commit. Raises UsageError if this user may not do that, RunError if the hub does
    not answer.
    """
    hub = library()

    def commit() -> str:
        api = hub.HfApi()
        api.create_repo(name, exist_ok=True)
        operations: list[Any] = []
        for path, content in contents.items():
            if content is not None:
                operations.append(hub.CommitOperationAdd(path, content))
            elif api.file_exists(name, path):
                operations.append(hub.CommitOperationDelete(path))
        return str(api.create_commit(name, operations, commit_message=message).oid)

    return _asked(f"--push {name}", commit)


def _asked(what: str, ask: Callable[[], Result]) -> Result:
    """Return what the hub answers; turn its errors into one line about `what`."""
    try:
        with quiet():
            return ask()
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise explained(what, error) from error
    except (UsageError, RunError):
        raise
    except Exception as error:  # of httpx, of the hub's own checks, of hf_xet
        raise explained(what, error) from error

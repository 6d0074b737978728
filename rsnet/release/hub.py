"""Releases on the Hugging Face hub, which go by hf://USER/NAME or hf://USER/NAME@REVISION."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipelines.utils.errors import RunError, UsageError, first_line

Result = TypeVar("Result")

# A path has one of two slashes that follow each other.
_ADDRESS = re.compile(r"hf://?(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^@]+))?")

LOGIN = "log in by `hf auth login`, or set HF_TOKEN"


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
    hub = _library()
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
    hub = _library()
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
    hub = _library()

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


def _library() -> Any:
    try:
        library = importlib.import_module("huggingface_hub")
        for part in ("constants", "errors", "utils"):  # it imports them when they are needed
            importlib.import_module(f"huggingface_hub.{part}")
    except ImportError:
        raise UsageError(
            'huggingface_hub is not installed: pip install "rsnet-trainer[hub]"'
        ) from None
    return library


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's warnings from stderr, and, where that is no terminal, its progress bars."""
    utils = _library().utils
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


def _asked(what: str, ask: Callable[[], Result]) -> Result:
    """Return what the hub answers; turn its errors into one line about `what`."""
    try:
        with _quiet():
            return ask()
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise _explained(what, error) from error
    except (UsageError, RunError):
        raise
    except Exception as error:  # of httpx, of the hub's own checks, of hf_xet
        raise _explained(what, error) from error


def _explained(what: str, error: Exception) -> UsageError | RunError:
    hub = _library()
    errors = hub.errors
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = first_line(error)
    if isinstance(error, errors.GatedRepoError):
        return UsageError(f"{what}: its owner wants to be asked: do so on its page, then {LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{what}: there is no such revision in this repository")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(f"{what}: there is no such repository, or it is private: {LOGIN}")
    if status in (401, 403):
        return UsageError(
            f"{what}: the hub does not let this token do that ({_said(error)}): {LOGIN}"
        )
    if isinstance(error, errors.OfflineModeIsEnabled) or hub.constants.HF_HUB_OFFLINE:
        return RunError(f"{what}: HF_HUB_OFFLINE is set, and it is not in the cache; unset it once")
    if isinstance(error, errors.HFValidationError) or reason.startswith("Invalid metadata"):
        return UsageError(f"{what}: {' '.join(str(error).split())}")
    if status is not None:
        return RunError(f"{what}: the hub answers {status} ({_said(error)}); try again later")
    return RunError(f"{what}: the hub cannot be reached ({reason}); try again")


def _said(error: Exception) -> str:
    """Return the hub's own words, or else those of its library."""
    return str(getattr(error, "server_message", None) or first_line(error)).splitlines()[0]

"""Runs and checkpoints in object storage, of which the argument of a command names one by its URL."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.utils.atomic_io import atomic_write, sha256_file
from pipelines.utils.errors import DataError, UsageError
from pipelines.utils.locks import exclusive_lock
from rsnet.checkpoint.remote import FOLDER, RemoteRun

PARTIAL = ".part"


@contextmanager
def local_copy(url: str, newest: bool) -> Iterator[Path]:
    """Give the local copy of a run's best checkpoint, or of the one that a URL names, in a run directory.

    It stays until the block ends: then another command may replace it by another checkpoint of the run. What
    is in the cache and whole is not fetched again. newest: take the last checkpoint before the best one.

    Raises UsageError if there is none, DataError if all are damaged, RunError if the storage does not answer.
    """
    base, _, file = url.rpartition(f"/{FOLDER}/")
    remote = RemoteRun(base or url)
    if not _names(remote, file if base else "", newest):
        raise UsageError(f"{url} is no run with checkpoints, nor one of them")
    folder = _cache() / hashlib.sha256(remote.url.encode()).hexdigest()[:16] / remote.name
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    taken = f"{remote.url}: another command is reading it; this one waits"
    with exclusive_lock(folder.parent / ".lock", taken, waits=True):
        _remove_partial(folder)  # of commands that were killed
        # Again: while this one waited, a training may have replaced them.
        found = _first_whole(remote, _names(remote, file if base else "", newest), folder)
        for other in (folder / FOLDER).glob("*.pt"):
            # Of former calls: the cache does not grow. Other files there are the user's.
            if other != found and remote.hash_of(f"{FOLDER}/{other.name}"):
                other.unlink(missing_ok=True)
        for name in remote.small_files():
            if (data := remote.store.read(name)) is not None:
                atomic_write(folder / name, data)
        yield found


def _remove_partial(folder: Path) -> None:
    for path in (folder / FOLDER).glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)


def _first_whole(remote: RemoteRun, names: list[str], folder: Path) -> Path:
    for i, name in enumerate(names):
        path = folder / name
        if path.is_file() and sha256_file(path) == remote.hash_of(name):
            return path
        partial = path.with_name(path.name + PARTIAL)
        try:
            remote.fetch(name, partial)
            return partial.replace(path)
        except DataError:
            if i == len(names) - 1:
                raise
        finally:
            _remove_partial(folder)
    raise AssertionError


def _names(remote: RemoteRun, file: str, newest: bool) -> list[str]:
    """Return the names of checkpoints, in the order in which they are asked for; of `file`, if given."""
    if file:
        names = [f"{FOLDER}/{file}"]
    else:
        last, best = [stored.name for stored in remote.checkpoints()], remote.best()
        names = last if best is None else [*last, best] if newest else [best]
    return [name for name in names if remote.hash_of(name)]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsnet" / "runs"

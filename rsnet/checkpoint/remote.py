"""A run in object storage: checkpoints under names that hold their hashes, and small files.

An object is written whole or not at all, and none of a checkpoint is ever changed: whatever two processes or
a kill do, what is stored under a name either has the name's hash or is not taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipelines.storage.folder import ObjectStore
from pipelines.utils.atomic_io import atomic_write, sha256_file
from pipelines.utils.errors import DataError, UsageError
from pipelines.utils.location import Url
from rsnet.checkpoint import io
from rsnet.checkpoint.manager import CheckpointManager

FOLDER, BEST, OWNER = "checkpoints", "checkpoints/best.json", "owner.json"
_NAME = re.compile(r"(\d+)-epoch-(\d+)-update-(\d+)-([0-9a-f]{64})\.pt")
_OF_ANY = re.compile(r"checkpoints/[\w-]*-([0-9a-f]{64})\.pt")
_SMALL = re.compile(r"\w[\w.-]*")  # no path that leads elsewhere
DOWNLOADS = 3  # of an object, before it is taken for damaged


class Stored(NamedTuple):
    """A checkpoint in object storage: its number in the run, its place in the training, its hash."""

    number: int
    epoch: int
    done: int
    sha256: str

    @property
    def name(self) -> str:
        """The object's name."""
        number, epoch, done, sha256 = self
        return f"{FOLDER}/{number:06d}-epoch-{epoch}-update-{done}-{sha256}.pt"


class RemoteRun:
    """A run in object storage. Raises the errors of `ObjectStore`."""

    def __init__(self, url: str) -> None:
        self.store = ObjectStore(url)
        self.url = url

    @property
    def name(self) -> str:
        """The name of the run."""
        return Url(self.url).name

    @staticmethod
    def hash_of(name: str) -> str:
        """Return the SHA-256 that the name of a checkpoint's object holds; "" if it is no such name."""
        match = _OF_ANY.fullmatch(name)
        return match[1] if match else ""

    def checkpoints(self) -> list[Stored]:
        """Return the last checkpoints, newest first."""
        found = []
        for name in self.store.list():
            if match := _NAME.fullmatch(name.removeprefix(f"{FOLDER}/")):
                number, epoch, done = map(int, match.groups()[:3])
                found.append(Stored(number, epoch, done, match[4]))
        return sorted(found, reverse=True)

    def small_files(self) -> list[str]:
        """Return the names of the run's other files."""
        return [name for name in self.store.list() if "/" not in name and is_small_file(name)]

    def bests(self) -> list[str]:
        """Return the names of objects that are no last checkpoints."""
        return [name for name in self.store.list() if name.startswith(f"{FOLDER}/best-")]

    def best(self) -> str | None:
        """Return the name of the best checkpoint's object; None if none is known."""
        try:
            name = json.loads(self.store.read(BEST) or b"{}").get("name")
        except (ValueError, AttributeError):
            return None
        return name if isinstance(name, str) and self.hash_of(name) else None

    def note_best(self, name: str) -> None:
        """Name the object that is the best checkpoint."""
        self.store.write(BEST, json.dumps({"name": name}).encode())

    def fetch(self, name: str, target: Path) -> None:
        """Write a checkpoint's object to a local file. Raises DataError if its hash is not its name's."""
        for _ in range(DOWNLOADS):
            self.store.get(name, target)
            if sha256_file(target) == self.hash_of(name):
                return
        target.unlink(missing_ok=True)
        raise DataError(f"{self.url}/{name} is damaged: its SHA-256 is not that of its name")


def is_small_file(name: str) -> bool:
    """Return whether a file of a run directory is one of those that are uploaded, by its name."""
    is_aside = name in (OWNER, "lock") or name.endswith((".tmp", ".local"))
    return _SMALL.fullmatch(name) is not None and not is_aside


def fetch_newest(remote: RemoteRun, folder: Path, keep: int, say: Callable[[str], None]) -> None:
    """Bring the newest whole checkpoint in object storage to the run directory `folder`, with the best one
    and the small files, unless what is there is as new.

    Raises DataError if there are some and none is whole, neither here.
    """
    stored = remote.checkpoints()
    manager = CheckpointManager(folder / FOLDER, keep)
    pending = manager.folder / "next.pt"
    for i, checkpoint in enumerate(stored):
        if not _is_newer(stored[i:], manager):
            return
        manager.folder.mkdir(parents=True, exist_ok=True)
        try:
            remote.fetch(checkpoint.name, pending)
        except DataError as error:
            say(f"{error}; an older one is tried")
            continue
        _fetch_best(remote, manager, say)
        _fetch_small_files(remote, folder)
        manager.take_in(pending)  # at the end: with it here, nothing is fetched any longer
        say(f"from {remote.url}: {checkpoint.name}")
        return
    if stored and not manager.last.exists():
        raise DataError(
            f"{remote.url} has no checkpoint that is whole; give another --output to begin anew"
        )


def require_of_run(remote: RemoteRun, folder: Path) -> None:
    """Raise UsageError if both have checkpoints, and none in common: one run would replace the other.

    folder: the run directory of a run that was not uploaded to that URL before.
    """
    stored = {checkpoint.sha256 for checkpoint in remote.checkpoints()}
    here = {io.sha256(path) for path in CheckpointManager(folder / FOLDER).lasts()}
    if stored and here and not stored & here:
        raise UsageError(
            f"{folder} holds a run, and {remote.url} another one; give a URL with another last name, or "
            "run in another folder"
        )


def _is_newer(stored: list[Stored], manager: CheckpointManager) -> bool:
    """Return whether the first of some checkpoints is newer than the last one here."""
    here = [io.sha256(path) for path in manager.lasts()]
    if not here or stored[0].sha256 in here:
        return not here
    if here[0] in {checkpoint.sha256 for checkpoint in stored}:
        return True
    try:
        last = io.load(manager.last)
    except DataError:
        return True
    return (stored[0].epoch, stored[0].done) > (last.epoch, last.done)


def _fetch_best(remote: RemoteRun, manager: CheckpointManager, say: Callable[[str], None]) -> None:
    pending, name = manager.folder / "next-best.pt", remote.best()
    if name is None or (manager.best.exists() and name.endswith(f"{io.sha256(manager.best)}.pt")):
        return
    try:
        if name not in remote.store.list():
            raise DataError(f"{remote.url}/{name}, the best checkpoint, is not there")
        remote.fetch(name, pending)
    except DataError as error:
        say(f"{error}; the next epoch's is the best")
        return
    manager.take_in(pending, is_best=True)


def _fetch_small_files(remote: RemoteRun, folder: Path) -> None:
    """Write the run's small files; one that is there with another content becomes NAME.local."""
    for name in remote.small_files():
        path = folder / name
        data = remote.store.read(name)
        if data is None or (path.is_file() and path.read_bytes() == data):
            continue
        if path.exists():
            path.replace(path.with_name(f"{name}.local"))
        atomic_write(path, data)

"""The checkpoints of a run: the last few, the best, and which of them a crash left whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pipelines.utils.atomic_io import fsync, fsync_directory
from pipelines.utils.errors import DataError
from rsnet.checkpoint import io
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.bounds import MAX_KEPT


class CheckpointManager:
    """A folder with last.pt, the ones before it (last-1.pt, last-2.pt, ...) and best.pt.

    Files change their names by links and renames alone, after their hashes were noted, so that a kill
    at any moment leaves last.pt whole.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self.last = folder / "last.pt"
        self.best = folder / "best.pt"

    def save(self, checkpoint: Checkpoint, is_best: bool = False) -> None:
        """Write `checkpoint` to last.pt, and before that to best.pt if `is_best`: last.pt must never
        mention a best.pt that does not exist.

        Raises OSError, if the disk does not take it; what was there stays, under the same names.
        """
        pending = self.last.with_name("next.pt")
        io.save(pending, checkpoint)
        if is_best:
            _copy(pending, self.best)
        self.take_in(pending)
        for age in range(self.keep, MAX_KEPT):  # --keep is smaller than before
            if self._aged(age).exists():
                io.remove(self._aged(age))

    def take_in(self, pending: Path, is_best: bool = False) -> None:
        """Make a file in the folder last.pt, the older ones one older, or make it best.pt instead."""
        if is_best:
            _copy(pending, self.best)
        else:
            for age in range(self.keep - 1, 0, -1):
                if self._aged(age - 1).exists():
                    _copy(self._aged(age - 1), self._aged(age))
            _copy(pending, self.last)
        io.remove(pending)

    def lasts(self) -> list[Path]:
        """Return the last checkpoints that are there, newest first."""
        return [p for age in range(MAX_KEPT) if (p := self._aged(age)).exists()]

    def newest(
        self, say: Callable[[str], None], moves: bool = True
    ) -> tuple[Path, Checkpoint] | None:
        """Return the newest checkpoint that is whole, after its path; None if there is none at all.

        moves: whether to rename damaged files, so that they never displace an intact one; each is reported.

        Raises DataError if all are damaged, or only the best is left.
        """
        damaged: list[Path] = []
        for path in self.lasts():
            try:
                checkpoint = io.load(path)
            except DataError as error:
                say(f"{error}; an older one is tried")
                damaged.append(path)
                continue
            for other in damaged if moves else []:
                other.replace(other.with_name(other.name + ".damaged"))
                say(f"{other} is now {other.name}.damaged")
            return path, checkpoint
        if damaged or self.best.exists():
            best = f"; go on from the best by --resume {self.best}" if self.best.exists() else ""
            raise DataError(f"{self.folder} has no last checkpoint that is whole{best}")
        return None

    def load_best(self, say: Callable[[str], None]) -> Checkpoint | None:
        """Return the content of best.pt; None if there is none. A damaged one is renamed, which is said."""
        if not self.best.exists():
            return None
        try:
            return io.load(self.best)
        except DataError as error:
            moved = self.best.replace(self.best.with_name(self.best.name + ".damaged"))
            say(f"{error}; it is now {moved.name}, and the next epoch's is the best")
            return None

    def _aged(self, age: int) -> Path:
        return self.last if age == 0 else self.folder / f"last-{age}.pt"


def _copy(source: Path, target: Path) -> None:
    """Give `target` the content of `source`, at once; on most file systems without copying a byte."""
    temporary = target.with_name(target.name + ".tmp")
    link_or_copy(source, temporary)
    io.note_hashes(target, [io.sha256(p) for p in (source, target) if p.exists()])
    temporary.replace(target)
    fsync_directory(target.parent)
    io.note_hashes(target, [io.sha256(target)])  # so that sha256sum --check agrees


def link_or_copy(source: Path, target: Path) -> None:
    """Give `target` the content that `source` has now, under another name. Raises OSError."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            fsync(file.fileno(), target)

"""Uploads a run to object storage in the background, in a thread."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.utils.errors import first_line
from rsnet.checkpoint import io
from rsnet.checkpoint.manager import CheckpointManager, link_or_copy
from rsnet.checkpoint.remote import FOLDER, OWNER, RemoteRun, Stored, is_small_file

MAX_BYTES = 64 << 20  # of what is taken for a small file
METRICS = "metrics.jsonl"  # a gigabyte, with a line of each of a million steps
PATIENCE = 3  # checkpoints in a row that are not uploaded, after which `add` returns a line


class _TakenOver(Exception):  # noqa: N818
    """Another run uploads to the same URL."""


class Uploader:
    """Uploads the checkpoints of a run, the newest at a time, and the small files of its directory.

    A failed upload is reported and retried with the next checkpoint; it never raises.

    say: is called by the thread, too.
    """

    def __init__(
        self, remote: RemoteRun, folder: Path, keep: int, say: Callable[[str], None]
    ) -> None:
        self.remote, self.folder, self.keep, self.say = remote, folder, keep, say
        self.problem = ""  # of the last upload; "" if it is there
        self._manager = CheckpointManager(folder / FOLDER)
        self._next = self._manager.folder / "upload-next.pt"
        self._sending = self._manager.folder / "upload.pt"
        self._id = secrets.token_hex(8)
        self._failures = 0
        self._changed = threading.Condition()
        self._next_place: tuple[int, int] | None = None  # of what is to be uploaded next
        self._place: tuple[int, int] | None = None  # of what is being uploaded
        self._is_closing = False
        self._stored: list[Stored] = []  # by this process, which has verified it
        self._best = "", ""  # hash of the best one that is stored, and its object's name
        self._sent: dict[str, tuple[int, int]] = {}  # of small files, time and size
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)

    def start(self) -> None:
        """Take over the URL from any other run. Raises what `ObjectStore` does."""
        before = self._owner()
        if before is not None:
            self.say(
                f"note: {self.remote.url}: a run on {before.get('host')} has not ended here; if it is not "
                "lost, it stops uploading now"
            )
        about = {"run": self._id, "host": socket.gethostname(), "pid": os.getpid()}
        about["since"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.remote.store.write(OWNER, json.dumps(about).encode())
        self._thread.start()

    def add(self, epoch: int, done: int) -> str:
        """Let last.pt, of this place in the training, be uploaded, in place of one that still waits.

        Returns what is wrong, in words, if uploads have failed for long; else "".
        """
        with self._changed:
            try:
                link_or_copy(self._manager.last, self._next)
                self._next_place = epoch, done
            except OSError as error:
                self._fail(error)
            self._changed.notify()
            return self.problem if self._failures >= PATIENCE else ""

    def close(self, seconds: float) -> str:
        """Upload what is left, for so long at most; return what is not there, in words, "" if all is.

        If nothing was started, nothing is uploaded.
        """
        if self._thread.ident is None:
            return ""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            return f"cannot upload to {self.remote.url}: it takes more than {seconds:.0f} s"
        for path in (self._next, self._sending):
            path.unlink(missing_ok=True)
        return self.problem

    def _run(self) -> None:
        is_last = False
        while not is_last:
            try:
                with self._changed:
                    self._changed.wait_for(lambda: self._next_place is not None or self._is_closing)
                    is_last = self._is_closing
                    if self._next_place is not None:
                        place, self._next_place = self._next_place, None
                        self._next.replace(self._sending)
                        self._place = place
                self._upload()
                if is_last and self._is_own(self._owner()):  # another may have begun meanwhile
                    self.remote.store.remove(OWNER)
            except Exception as error:  # whatever a library raises, the training goes on
                self._fail(error)
                if isinstance(error, _TakenOver):
                    return
            else:
                self.problem, self._failures = "", 0

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        self.problem = f"cannot upload to {self.remote.url}: {first_line(error)}"
        if isinstance(error, _TakenOver):
            self._failures = PATIENCE
            self.say(self.problem)
        elif not self._is_closing:
            self.say(f"{self.problem}; it is tried again with the next checkpoint")

    def _upload(self) -> None:
        """Upload what changed: the small files first, as a checkpoint needs the metrics before it."""
        self._require_own()
        for name, path in self._small_files():
            stat = path.stat()
            if self._sent.get(name) != (stat.st_mtime_ns, stat.st_size):
                self.remote.store.write(name, path.read_bytes())
                self._sent[name] = stat.st_mtime_ns, stat.st_size
        stored = self.remote.checkpoints()
        if self._place is not None:
            self._send(stored, *self._place)
            self._sending.unlink()
            self._place = None
        if self._manager.best.exists():
            self._send_best(stored)
        self._remove_old(stored)

    def _small_files(self) -> Iterator[tuple[str, Path]]:
        """Yield the names and paths of the run directory's files, and of TensorBoard's."""
        paths = [*self.folder.iterdir(), *(self.folder / "tensorboard").glob("*")]
        for path in sorted(paths):
            if not (is_small_file(path.name) and path.is_file()):
                continue
            if path.name == METRICS or path.stat().st_size <= MAX_BYTES:
                yield path.relative_to(self.folder).as_posix(), path

    def _send(self, stored: list[Stored], epoch: int, done: int) -> None:
        """Store the checkpoint that waits, unless it is the newest there."""
        sha256 = io.sha256(self._sending)
        if stored and stored[0].sha256 == sha256:
            return
        new = Stored(1 + max((s.number for s in stored), default=0), epoch, done, sha256)
        self.remote.store.put(new.name, self._sending)
        stored.insert(0, new)
        self._stored = [new, *self._stored][: self.keep]

    def _send_best(self, stored: list[Stored]) -> None:
        """Let the best checkpoint be known, and store it if it is none of the last ones."""
        best = self._manager.folder / "upload-best.pt"
        link_or_copy(self._manager.best, best)  # so that it stays what it is
        sha256 = io.sha256(best)
        if self._best[0] != sha256:
            names = [s.name for s in stored if s.sha256 == sha256]
            name = names[0] if names else f"{FOLDER}/best-{sha256}.pt"
            if not names:
                self.remote.store.put(name, best)
            self.remote.note_best(name)
            self._best = sha256, name
        best.unlink()

    def _remove_old(self, stored: list[Stored]) -> None:
        """Remove what is older than --keep checkpoints that this process has verified, but for the best."""
        if len(self._stored) < self.keep:
            return
        self._require_own()
        best = self._best[1] or self.remote.best()
        old = [s.name for s in stored if s.number < self._stored[-1].number]
        for name in (*old, *self.remote.bests()):
            if name != best:
                self.remote.store.remove(name)

    def _owner(self) -> dict[str, Any] | None:
        """Return what the run that uploads to the URL noted of itself; None if there is none."""
        data = self.remote.store.read(OWNER)
        try:
            owner = json.loads(data or b"null")
        except ValueError:
            owner = None
        return owner if isinstance(owner, dict) else None

    def _is_own(self, owner: Mapping[str, Any] | None) -> bool:
        return owner is not None and owner.get("run") == self._id

    def _require_own(self) -> None:
        owner = self._owner()
        if not self._is_own(owner):
            host = f" on {owner.get('host')}" if owner else ""
            raise _TakenOver(f"another run{host} has taken it over")

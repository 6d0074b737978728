"""TensorBoard: an event file that has what metrics.jsonl has.

A run that is resumed writes the file anew, from the metrics that it kept, so that nothing is there twice and
nothing of what was abandoned; TensorBoard's own way is to mark the older events as void. The records are
written here, because tensorboard's writer holds them back for two minutes, which a kill would lose.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.utils.errors import UsageError, os_error_line
from pipelines.utils.locks import exclusive_lock
from pipelines.utils.schema import parsing
from rsnet.loggers.run_dir import whole_metrics

FOLDER = "tensorboard"  # in the run directory
_MINE = ".rsnet"  # ends the names of the files that may be replaced


class TensorBoardLogger:
    """The event file of a run directory; none if not `active`.

    A disk that does not take it is said once, and ends no training.
    """

    def __init__(self, directory: Path, active: bool, say: Callable[[str], None]) -> None:
        self._directory, self._say = directory, say
        self._file: BinaryIO | None = None
        if active:
            self._do(self._open)

    def log(self, line: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl."""
        if (file := self._file) is not None:
            self._do(lambda: _write(file, _event(line)))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._do(self._file.close)
            self._file = None

    def _open(self) -> None:
        path, _ = write_events(self._directory)
        self._file = path.open("ab", buffering=0)

    def _do(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
            self._file = None
            self._say(
                f"TensorBoard: lost ({os_error_line(error)}); `rsnet sync {self._directory}` writes its "
                "files later"
            )


def rewrite(directory: Path) -> int:
    """Write the event file of a run anew; return the lines of metrics in it.

    Raises UsageError if there are no metrics or a process still trains there, DataError if a line is damaged.
    """
    if not (directory / "metrics.jsonl").is_file():
        raise UsageError("there are no metrics; is it the directory of a run?")
    running = "a process that still runs trains in it, and writes TensorBoard's files itself"
    with exclusive_lock(directory / "lock", running):
        return write_events(directory)[1]


def write_events(directory: Path) -> tuple[Path, int]:
    """Write a whole event file, in place of earlier ones; return its path and the lines of metrics in it."""
    from tensorboard.compat.proto import event_pb2  # a second, which only this needs

    metrics, folder = directory / "metrics.jsonl", directory / FOLDER
    folder.mkdir(exist_ok=True)
    remedy = "TensorBoard's files cannot be written"
    rows = whole_metrics(metrics, remedy)
    with parsing(metrics, remedy):
        events = [_event(row) for row in rows]
    now = time.time()
    version = event_pb2.Event(wall_time=now, file_version="brain.Event:2")
    # A TensorBoard that shows the run drops what it had read of the earlier file.
    begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    restart = event_pb2.Event(wall_time=now, step=0, session_log=begin)
    path = folder / f"events.out.tfevents.{int(now):010}.{socket.gethostname()}{_MINE}"
    earlier = set(folder.glob(f"events.out.tfevents.*{_MINE}")) - {path}
    partial = folder / "partial"
    with partial.open("wb") as file:
        for event in (version, restart, *events):
            _write(file, event)
    partial.replace(path)
    for old in earlier:
        old.unlink(missing_ok=True)
    return path, len(events)


def _event(line: Mapping[str, Any]) -> Any:
    """Return a line of metrics as an event of the same step, time and names."""
    from tensorboard.compat.proto import event_pb2, summary_pb2

    values = [
        summary_pb2.Summary.Value(tag=name, simple_value=value)
        for name, value in line.items()
        if name not in ("step", "time") and isinstance(value, int | float)
    ]
    return event_pb2.Event(
        wall_time=line["time"], step=line["step"], summary=summary_pb2.Summary(value=values)
    )


def _write(file: BinaryIO, event: Any) -> None:
    """Append a record, by one write: whole, or not at all. Raises OSError."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    written = file.write(record.getbuffer())
    if written < len(record.getbuffer()):  # of a raw file that is no error
        file.truncate(file.tell() - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

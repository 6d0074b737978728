"""What libraries print, apart from what this program says: kept in memory, and then in a file."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from pipelines.utils.output import guard_output, moved, say


class _LibraryOutput:
    """The file behind the descriptors 1 and 2, and a stream into it for Python's warnings and log records."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._before = 0  # bytes that the file had
        fd = os.memfd_create("library output")  # until there is a folder
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        self._file = io.FileIO(fd, "r+")
        self.text = io.TextIOWrapper(
            io.FileIO(os.dup(fd), "w"), errors="backslashreplace", write_through=True
        )

    def redirect(self) -> None:
        for fd in (1, 2, self.text.fileno()):
            os.dup2(self._file.fileno(), fd)

    def read(self) -> bytes:
        """Return what was printed, or was since the file was opened."""
        self._file.seek(self._before)
        return self._file.read()

    def move_to(self, path: Path) -> None:
        """Append to a file from now on, and what there was before; a disk that refuses changes nothing."""
        with contextlib.suppress(OSError):
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            file = io.FileIO(os.open(path, flags, 0o666), "r+")
            so_far = self.read()
            self._before = file.seek(0, os.SEEK_END)
            file.write(so_far)
            self._file.close()
            self.path, self._file = path, file
            self.redirect()

    def close(self) -> None:
        self.text.close()
        if self.path is not None and os.fstat(self._file.fileno()).st_size == 0:
            self.path.unlink(missing_ok=True)
        self._file.close()


_taken: _LibraryOutput | None = None


def keep_library_output(path: Path) -> None:
    """Append what libraries have printed in `apart_from_libraries`, and will, to a file."""
    if _taken is not None:
        _taken.move_to(path)


@contextlib.contextmanager
def apart_from_libraries() -> Iterator[None]:
    """Let sys.stdout and sys.stderr alone reach the console in this block.

    What C libraries and child processes print on the descriptors 1 and 2, Python's warnings, and log records
    that have no handler, go to a file: that of `keep_library_output`, else to none. They may explain an error
    that leaves the block, which comes with the file's name or, without one, with what was printed. A crash
    prints Python's traceback on the console.
    """
    global _taken
    guard_output(False)  # so that the descriptors are open
    kept = {1: os.dup(1), 2: os.dup(2)}
    streams = {
        name: getattr(sys, name) for name in ("stdout", "stderr", "__stdout__", "__stderr__")
    }
    handlers = warnings.showwarning, logging.lastResort
    finds_faults = not faulthandler.is_enabled()
    _taken = taken = _LibraryOutput()
    opened = _take_streams(kept)
    guard_output(False)
    warnings.showwarning = _write_warning  # type: ignore[assignment]
    logging.lastResort = logging.StreamHandler(taken.text)
    logging.lastResort.setLevel(logging.WARNING)
    if finds_faults:
        faulthandler.enable(kept[2])
    taken.redirect()
    try:
        yield
    except Exception:
        if printed := taken.read():
            _explain(printed, taken.path)
        raise
    finally:
        if finds_faults:
            faulthandler.disable()
        warnings.showwarning, logging.lastResort = handlers
        for stream in opened:
            with contextlib.suppress(OSError):
                stream.flush()
        for name, stream in streams.items():
            setattr(sys, name, stream)
        guard_output(False)
        _taken = None
        taken.close()
        for fd, copy in kept.items():
            os.dup2(copy, fd)
            os.close(copy)


def _take_streams(kept: dict[int, int]) -> list[TextIO]:
    """Let the standard streams that write to the descriptors 1 and 2 write to their copies."""
    opened: list[TextIO] = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            copy = kept[stream.fileno()]
        except (OSError, KeyError):  # it writes elsewhere
            continue
        stream.flush()
        other = moved(stream, copy)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, f"__{name}__", other)
        setattr(sys, name, other)
        opened.append(other)
    return opened


def _write_warning(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
    if _taken is not None:
        _taken.text.write(warnings.formatwarning(message, category, filename, lineno))


def _explain(printed: bytes, path: Path | None) -> None:
    if path is None:
        sys.stderr.write(printed.decode(errors="backslashreplace"))
    else:
        say(f"the output of libraries is in {path}", sys.stderr)

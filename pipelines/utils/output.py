"""stdout and stderr: losing them ends no command, and printed text cannot move the terminal's cursor."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import Any, TextIO

from pipelines.utils.text import printable


class _Stream(io.RawIOBase):
    """A standard stream that drops what cannot be written: to a closed terminal, a full disk."""

    def __init__(self, stream: io.TextIOWrapper, raw: io.FileIO) -> None:
        super().__init__()
        self._stream, self._raw = stream, raw  # the stream closes the descriptor when it is let go
        self.lost: OSError | None = None  # the first error
        self.is_result = False  # whether the first error is raised

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._raw.isatty()

    def fileno(self) -> int:
        return self._raw.fileno()

    def write(self, data: Any, /) -> int:
        try:
            while (written := self._raw.write(data)) is None:  # a terminal that is set to not block
                select.select([], [self._raw], [])
            return written
        except OSError as error:
            is_first, self.lost = self.lost is None, self.lost or error
            if is_first and self.is_result:
                raise
        return len(data)


class _Nowhere(io.TextIOBase):
    """The stream of a process that was started without."""

    def write(self, text: str, /) -> int:
        return len(text)


# Of stdout; a bar replaces sys.stdout while it is drawn.
_stdout: _Stream | None = None


def guard_output(is_result: bool) -> None:
    """Let a loss of stdout or stderr end nothing; with `is_result`, the first one of stdout raises OSError.

    Characters that cannot be encoded, such as a path's bytes that are no text, are escaped.
    """
    global _stdout
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # Else the next file that is opened gets this number, and with it what C libraries print.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _Nowhere())
        elif isinstance(stream, io.TextIOWrapper):
            if _guard(stream) is None and isinstance(raw := _raw(stream), io.FileIO):
                guarded = _guarded(stream, raw)
                # sys.__stdout__ too, by which others recognise the process's own stream.
                if stream is getattr(sys, f"__{name}__"):
                    setattr(sys, f"__{name}__", guarded)
                setattr(sys, name, guarded)
            getattr(sys, name).reconfigure(errors="backslashreplace")
    if (_stdout := _guard(sys.stdout)) is not None:
        _stdout.is_result = is_result


def lost_output() -> OSError | None:
    """Return what the first write to stdout that failed raised; None if there is none."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    return _stdout.lost if _stdout else None


def say(text: str, file: TextIO | None = None) -> None:
    """Print one line, by default on stdout, whatever names of files and classes are in it."""
    print(printable(text), file=file or sys.stdout, flush=True)


def note_once(kind: str, text: str) -> None:
    """Print on stderr what does not end the command, unless the same kind was printed before."""
    if kind not in _noted:
        _noted.add(kind)
        say(f"note: {text}", sys.stderr)


_noted: set[str] = set()


def is_terminal(stream: TextIO) -> bool:
    """Return whether a bar can be drawn on a stream; FORCE_COLOR, which rich heeds, is about colours."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def _raw(stream: TextIO) -> Any:
    """Return what a text stream's bytes go to; a stream that is not buffered has no more layers."""
    return getattr(stream.buffer, "raw", stream.buffer)


def _guard(stream: TextIO) -> _Stream | None:
    if not isinstance(stream, io.TextIOWrapper):
        return None
    raw = _raw(stream)
    return raw if isinstance(raw, _Stream) else None


def moved(stream: io.TextIOWrapper, fd: int) -> io.TextIOWrapper:
    """Return a stream like a standard one that writes to another descriptor, which stays the caller's."""
    other = _guarded(stream, io.FileIO(fd, "w", closefd=False))
    other.reconfigure(errors=stream.errors)
    return other


def _guarded(stream: io.TextIOWrapper, raw: io.FileIO) -> io.TextIOWrapper:
    guard = _Stream(stream, raw)
    with contextlib.suppress(OSError):
        stream.flush()
    is_buffered = isinstance(stream.buffer, io.BufferedWriter)
    return io.TextIOWrapper(
        io.BufferedWriter(guard) if is_buffered else guard,  # type: ignore[arg-type]
        encoding=stream.encoding,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )

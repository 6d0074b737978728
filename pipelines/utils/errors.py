"""The errors that end a command with one line instead of a traceback."""

from __future__ import annotations

import errno
import io
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType


class UsageError(ValueError):
    """An option, file or folder that the user has to change. Exit code 2."""

    exit_code = 2


class DataError(RuntimeError):
    """Data that turned out to be broken while it was read or written. Exit code 1."""

    exit_code = 1


class RunError(RuntimeError):
    """A run that failed: a loss that is not finite, a rank that was lost. Exit code 1."""

    exit_code = 1


@contextmanager
def error_context(what: str) -> Iterator[None]:
    """Put the option or file that an error of the block is about in front of its message."""
    try:
        yield
    except (UsageError, DataError, RunError) as error:
        raise type(error)(f"{what}: {error}") from error


def os_error_line(error: OSError) -> str:
    """Return an error of the system as "PATH: REASON"; without the path for one that is about none.

    Python leaves the path out where a file is open: of reads, writes and fsync, as on a full disk.
    """
    reason = error.strerror or first_line(error)
    paths = [
        os.fsdecode(p) for p in (error.filename, error.filename2) if isinstance(p, str | bytes)
    ]
    if not paths and error.errno is not None and not isinstance(error, _OF_NO_FILE):
        paths = _open_path(error.__traceback__)
    return f"{' -> '.join(paths)}: {reason}" if paths else reason


_OF_NO_FILE = (ConnectionError, TimeoutError, ChildProcessError, socket.gaierror, socket.herror)


def _open_path(at: TracebackType | None) -> list[str]:
    """Return the path of the file that the innermost function of a traceback, which has one, works on."""
    for frame, _ in reversed([*traceback.walk_tb(at)]):
        values = list(frame.f_locals.values())
        for value in values:
            name = getattr(value, "name", None)
            if isinstance(value, io.IOBase) and isinstance(name, str | Path):
                return [str(name)]
        for value in values:
            if isinstance(value, Path):
                return [str(value)]
    return []


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def way_out(error: OSError) -> str:
    """Return what to do about a full disk, to follow the error's message; "" about other errors."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "; free some space there, or write elsewhere" if is_full else ""

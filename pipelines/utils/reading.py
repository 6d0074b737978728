"""Files and folders that the system fails to read: a RunError, as the file itself may be sound."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.utils.errors import DataError, RunError, first_line

# Size in bytes and modification time in ns; None for what is no file, such as a dangling link.
Stamp = tuple[int, int] | None

# What is at the path is no file. All else (rights, disks, network, memory) says nothing about the file.
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Raise RunError if the system fails to read `path` in the block; that there is no file is OSError."""
    try:
        yield
    except MemoryError:
        raise cannot_read(path, "not enough memory") from None
    except OSError as error:
        if error.errno in _NO_FILE:
            raise
        raise cannot_read(path, error.strerror or first_line(error)) from error


def cannot_read(path: str | Path, reason: str) -> RunError:
    """Return the error that ends a command, because nothing is known about the file or folder."""
    return RunError(f"cannot read {path}: {reason}; fix that, and run the same command again")


def file_state(path: str) -> os.stat_result | None:
    """Return a file's state, None if there is no file, as behind a dangling link. Raises RunError."""
    try:
        with reading(path):
            return os.stat(path)  # noqa: PTH116 - pathlib is slow on a million files
    except (OSError, ValueError):  # ValueError: of a zero byte in the path
        return None


def file_stamp(path: str) -> Stamp:
    """Return a regular file's stamp: whoever opens a pipe waits for ever. Raises RunError."""
    state = file_state(path)
    is_file = state is not None and stat.S_ISREG(state.st_mode)
    return (state.st_size, state.st_mtime_ns) if state is not None and is_file else None


def read_file(path: str | Path) -> bytes:
    """Return the content of a file. Raises DataError if there is none, RunError if it cannot be read."""
    try:
        with reading(path):
            state = os.stat(path)  # noqa: PTH116
            if not stat.S_ISREG(state.st_mode):  # opening a pipe would block
                raise DataError("it is no regular file")
            data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(error.strerror or first_line(error)) from None
    if not data:
        raise DataError("the file is empty")
    return data


def bytes_of(path: str | Path, offset: int, length: int, stamp: Stamp = None) -> bytes:
    """Return a part of a file. Raises OSError; RunError if it has another stamp, where one is given."""
    file = os.open(path, os.O_RDONLY)
    try:
        if stamp is not None:
            require_unchanged(file, stamp, path)
        return os.pread(file, length, offset)
    finally:
        os.close(file)


def require_unchanged(file: int, stamp: Stamp, path: str | Path) -> None:
    """Raise RunError if an open file has changed since it had this stamp: labels would be of other images."""
    state = os.fstat(file)
    if (state.st_size, state.st_mtime_ns) != stamp:
        raise RunError(
            f"{path} changed after the command began to read it; start again once it no longer changes"
        )

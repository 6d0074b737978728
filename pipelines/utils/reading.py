"""Files and folders that the system fails to read: a RunError, as the file itself may be sound."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.utils.errors import DataError, RunError, first_line

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


def bytes_of(path: Path, offset: int, length: int) -> bytes:
    """Return a part of a file. Raises OSError."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, length, offset)
    finally:
        os.close(file)

"""Files and folders that are written completely or not at all, and their SHA-256."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.utils.output import note_once

# What a file system says that lacks a call, as CIFS before Linux 4.17, NFS without a lock daemon, some FUSE.
NOT_THERE = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def atomic_write(path: Path, data: bytes | memoryview, *, alone: bool = False) -> None:
    """Write under a temporary name, then rename: a crash leaves the old file or the new one.

    Of processes that write the same file at once the last one wins. alone: there are none, so that the
    temporary name is always the same, and what a killed process left there, gigabytes of a checkpoint, is
    overwritten.

    Raises OSError, which names `path`, and leaves what was there.
    """
    infix = "" if alone else f".{secrets.token_hex(4)}"
    temporary = path.with_name(f"{path.name}{infix}.tmp")
    try:
        with open(temporary, "wb", opener=_open_no_link) as file:
            file.write(data)
            file.flush()
            fsync(file.fileno(), path)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        name_path(error, path)
        raise
    fsync_directory(path.parent)


def atomic_write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as indented JSON by `atomic_write`."""
    atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` when the block ends, or removed if it raises.

    Raises OSError, which names `path` or what belongs into it, also if `path` is a file or a folder that is
    not empty; it is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by the process's number, which is always 1 in a container: a killed one's would be in the way.
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            name = str(error.filename or path)
            name_path(error, Path(name.replace(str(temporary), str(path), 1)))
        raise
    fsync_directory(path.parent)


def name_path(error: OSError, path: Path) -> None:
    """Let an error's message name this path alone: full disks name none, renames a temporary one, too."""
    error.filename = str(path)
    del error.filename2  # if it were None, the message would say so


def fsync_directory(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk, so that they survive a power failure."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written, but not read
        return
    try:
        fsync(descriptor, folder)
    finally:
        os.close(descriptor)


def remove_partial(path: Path) -> None:
    """Delete a file that a killed command left unfinished: hundreds of GB, which the next one needs."""
    with contextlib.suppress(OSError):
        if path.is_file():
            path.unlink()


def fsync(descriptor: int, path: Path) -> None:
    """Wait until an open file or folder is on the disk, if its file system can tell. Raises OSError."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise OSError(error.errno, error.strerror, str(path)) from None
        note_once(
            "fsync",
            f"{path}: its file system does not support fsync ({error.strerror}); after a power failure the "
            "newest file may be missing",
        )


def free_space(folder: Path) -> float:
    """Return the bytes that can be written into a folder; infinity where its file system does not tell."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        return math.inf
    return usage.free if usage.total else math.inf


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_no_link(name: str, flags: int) -> int:
    """Open without following a link.

    In a folder that others made, the temporary name may be a link to one of the user's files.
    """
    return os.open(name, flags | os.O_NOFOLLOW, 0o666)

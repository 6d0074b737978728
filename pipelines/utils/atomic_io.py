"""Files and folders that are never half written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Write under another name and rename: a crash leaves the old file or the new one.

    Raises OSError; what was there stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb", opener=_open_no_link) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(path.parent)


def _open_no_link(name: str, flags: int) -> int:
    """A folder that others made may have a link under the temporary name, to a file of the user's."""
    return os.open(name, flags | os.O_NOFOLLOW, 0o666)


def atomic_write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`atomic_write` of an object."""
    atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends, or vanishes when it raises.

    Raises OSError, also if there is a file or a folder with something in it at `path`, which stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

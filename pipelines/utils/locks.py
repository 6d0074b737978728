"""Locks that one process holds at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pipelines.utils.errors import UsageError
from pipelines.utils.output import note_once, say

MOMENT = 1.0  # seconds


@contextmanager
def exclusive_lock(
    path: Path, taken: str, *, remove: bool = False, waits: bool = False
) -> Iterator[None]:
    """Hold the lock of the file `path`, which the kernel releases however this process ends.

    remove: delete the file at the end. waits: until another process has released it, which is noted unless
    that is at once. On a file system that knows no locks nothing is held.

    Raises UsageError with the message `taken` if another process holds it, PermissionError if the file is
    another user's.
    """
    # A soft lock, filelock's way without the kernel's, would outlive a process that is killed.
    lock = FileLock(path, timeout=MOMENT if waits else 0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        if not waits:
            raise UsageError(taken) from None
        say(f"note: {taken}", sys.stderr)
        lock.acquire(timeout=-1)
    except PermissionError:
        raise
    except OSError as error:
        note_once(
            "lock",
            f"{path}: no lock can be held ({error.strerror}); "
            "do not start a second command of this kind there",
        )
    try:
        yield
    finally:
        if remove:  # before the release: filelock tells whoever has opened the removed file to open it again
            with suppress(OSError):
                path.unlink()
        lock.release()

"""The errors that end a command with one line instead of a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


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


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def way_out(error: OSError) -> str:
    """Return what to do about a full disk, to follow the error's message; "" about other errors."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "; free some space there, or write elsewhere" if is_full else ""

"""The ways in which a run ends with one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """An option, file or folder that the user has to change. Exit code 2."""

    exit_code = 2


class DataError(RuntimeError):
    """Data that turned out to be broken on the way. Exit code 1."""

    exit_code = 1


class RunError(RuntimeError):
    """A run that cannot go on: a loss that is not finite, a lost process, no memory. Exit code 1."""

    exit_code = 1


@contextmanager
def error_context(what: str) -> Iterator[None]:
    """Name the option or file that an error of the block is about, in front of its message."""
    try:
        yield
    except (UsageError, DataError, RunError) as error:
        raise type(error)(f"{what}: {error}") from error


def first_line(error: BaseException) -> str:
    """What an error says, as one line; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

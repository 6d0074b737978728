"""The errors of a command: their kinds, exit codes and messages."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from pipelines.utils.errors import (
    DataError,
    RunError,
    UsageError,
    error_context,
    first_line,
    os_error_line,
)


@pytest.mark.parametrize(("kind", "code"), [(UsageError, 2), (DataError, 1), (RunError, 1)])
def test_a_context_names_the_file_and_keeps_the_kind_of_error(kind, code):
    with pytest.raises(kind) as end, error_context("x.json"):
        raise kind("it is damaged")
    assert type(end.value) is kind
    assert str(end.value) == "x.json: it is damaged"
    assert end.value.exit_code == code


def test_a_context_leaves_a_fault_of_the_program_alone():
    with pytest.raises(KeyError) as end, error_context("x.json"):
        raise KeyError("field")
    assert end.value.args == ("field",)


def _write_through_open(path: Path) -> None:
    with path.open("w") as file:
        file.write("x" * 100)


def _sync(path: Path) -> None:
    with path.open("wb") as file:
        os.fsync(file.fileno())


FULL = Path("/dev/full")
NO_SPACE = "/dev/full: No space left on device"


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: FULL.write_text("x"), NO_SPACE),
        (lambda: FULL.write_bytes(b"x" * 100_000), NO_SPACE),
        (lambda: _write_through_open(FULL), NO_SPACE),
        (lambda: Image.new("RGB", (8, 8)).save(FULL, "PNG"), NO_SPACE),
        (lambda: _sync(Path("/dev/null")), "/dev/null: Invalid argument"),
        (lambda: Path("/proc/self/mem").read_bytes(), "/proc/self/mem: Input/output error"),
        (lambda: Path("/no/x").read_text(), "/no/x: No such file or directory"),
        (lambda: os.listdir(b"/no/x"), "/no/x: No such file or directory"),
        (lambda: Path("/no").rename("/x"), "/no -> /x: No such file or directory"),
    ],
)
def test_an_error_of_the_system_names_the_file_also_where_python_does_not(act, line):
    with pytest.raises(OSError) as end:  # noqa: PT011 - the message is what is tested
        act()
    assert os_error_line(end.value) == line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no such program"), "no such program"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
    ],
)
def test_an_error_that_is_of_no_file_names_none(error, line):
    path = Path("x")  # which has nothing to do with it
    with pytest.raises(OSError) as end:  # noqa: PT011 - the message is what is tested
        raise error
    assert os_error_line(end.value) == line, path


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("one\ntwo"), "one"), (KeyError(), "KeyError"), (OSError(" \n"), "OSError")],
)
def test_the_first_line_of_an_error_is_never_empty(error, line):
    assert first_line(error) == line

"""Streams that are lost end no command, and bars are drawn on terminals alone."""

from __future__ import annotations

import errno
import io
import os
import pty
import sys
import threading
from pathlib import Path

import pytest

from pipelines.utils import output
from pipelines.utils.cli import exit_code
from pipelines.utils.errors import DataError
from pipelines.utils.output import is_terminal, lost_output, note_once, say


def _closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _closed_terminal() -> int:
    parent, child = pty.openpty()
    os.close(parent)
    return child


LOST = {
    errno.EPIPE: _closed_pipe,
    errno.EIO: _closed_terminal,
    errno.ENOSPC: lambda: os.open("/dev/full", os.O_WRONLY),
}


@pytest.fixture
def stream():
    """Makes a text stream of a descriptor, which is closed after the test."""
    opened = []

    def make(fd: int, buffering: int = -1) -> io.TextIOWrapper:
        opened.append(fd)
        file = open(fd, "wb", buffering, closefd=False)  # noqa: SIM115
        return io.TextIOWrapper(file, write_through=not buffering)  # type: ignore[type-var]

    yield make
    for fd in opened:
        os.close(fd)


def _talk() -> int:
    for _ in range(3):
        print("x" * 100_000)
    sys.stdout.flush()
    return 7


@pytest.mark.parametrize("buffering", [-1, 0])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("number", LOST)
def test_a_command_goes_on_without_a_stream_that_is_lost(
    monkeypatch, stream, number, name, buffering
):
    monkeypatch.setattr(sys, name, stream(LOST[number](), buffering))

    def talk() -> int:
        print("x" * 100_000, file=getattr(sys, name), flush=True)
        return _talk()

    assert exit_code("name", talk) == 7
    error = lost_output()
    assert (error.errno if error else None) == (number if name == "stdout" else None)
    getattr(sys, name).flush()  # as Python does in the end


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (errno.EPIPE, 141, ""),
        (errno.ENOSPC, 1, "name: error: cannot write to stdout: No space left on device\n"),
    ],
)
def test_a_command_whose_result_is_what_it_prints_ends_without_stdout(
    monkeypatch, capsys, stream, number, code, line
):
    monkeypatch.setattr(sys, "stdout", stream(LOST[number]()))
    assert exit_code("name", lambda: print("x") or 0, prints=True) == code
    assert capsys.readouterr().err == line
    sys.stdout.flush()


def test_without_streams_nothing_is_printed_into_files(monkeypatch):
    opened = []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        patch.setattr(os, "fstat", lambda fd: _raise(errno.EBADF) if fd == 1 else None)
        patch.setattr(os, "open", lambda *words: opened.append(words))
        assert exit_code("name", _talk) == 7
        print("y", file=sys.stderr)
    assert opened == [(os.devnull, os.O_RDWR)] * 2  # before the command, and after it


def _raise(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_a_stream_that_does_not_block_is_waited_for(monkeypatch, stream):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    monkeypatch.setattr(sys, "stdout", stream(writer))
    read: list[bytes] = []

    def drain() -> None:
        with os.fdopen(reader, "rb") as file:
            read.append(file.read())

    thread = threading.Thread(target=drain)
    thread.start()
    assert exit_code("name", _talk) == 7
    with Path(os.devnull).open("wb") as other:
        os.dup2(other.fileno(), writer)
    thread.join()
    assert len(read[0]) == 300_003


@pytest.mark.parametrize(
    ("term", "draws"), [("xterm", True), ("dumb", False), ("unknown", False), ("", False)]
)
def test_a_bar_follows_the_terminal_and_not_the_colours(monkeypatch, term, draws):
    monkeypatch.setenv("TERM", term)
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as terminal, Path(os.devnull).open("w") as other:
        monkeypatch.setenv("NO_COLOR", "1")
        assert is_terminal(terminal) is draws
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert not is_terminal(other)
    os.close(parent)


NAME = "b\udcff\x1b[2J\nc"  # bytes that are no text, a terminal's command, a line's end
SHOWN = "b\\udcff\\x1b[2J\\nc"


def test_names_are_escaped_in_lines_notes_and_errors(monkeypatch, capsys):
    monkeypatch.setattr(output, "_noted", set())

    def run() -> int:
        say(f"{NAME}: 3 images")
        note_once("kind", f"{NAME}: no lock")
        raise DataError(f"broken image {NAME}")

    assert exit_code("name", run) == 1
    out, err = capsys.readouterr()
    assert out == f"{SHOWN}: 3 images\n"
    assert err == f"note: {SHOWN}: no lock\nname: error: broken image {SHOWN}\n"


def test_the_path_of_a_systems_error_is_escaped(capsys):
    assert exit_code("name", lambda: len(Path(f"/no/{NAME}").read_text())) == 1
    assert capsys.readouterr().err == f"name: error: /no/{SHOWN}: No such file or directory\n"

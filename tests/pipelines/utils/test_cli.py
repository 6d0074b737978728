"""Errors of a command: one line, an exit code."""

from __future__ import annotations

import contextlib
import io
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from pipelines.utils.cli import command, exit_code, exit_if_not_installed, parse_options
from pipelines.utils.errors import DataError, UsageError


@dataclass(frozen=True)
class Options:
    number: int = 1
    """A number."""


def _raise(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("--x: no"), 2, "name: error: --x: no"),
        (DataError("broken"), 1, "name: error: broken"),
        (PermissionError(13, "Not you", "/p"), 1, "name: error: /p: Not you"),
        (
            OSError(28, "Full", "/p"),
            1,
            "name: error: /p: Full; free some space there, or write elsewhere",
        ),
        (KeyboardInterrupt(), 130, "name: interrupted"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, line):
    assert exit_code("name", lambda: _raise(error)) == code
    assert capsys.readouterr().err == line + "\n"


def test_a_fault_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_code("name", lambda: 1 // 0)


def test_ctrl_c_while_a_script_imports_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop, exit_if_not_installed("train.py", "train"):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"


def test_a_path_that_is_no_text_can_be_printed(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdout", stdout)
    assert exit_code("name", lambda: print("a\udcffb") or 0) == 0
    stdout.flush()
    assert stdout.buffer.getvalue() == b"a\\udcffb\n"


def test_options_are_parsed_and_the_result_is_the_exit_code():
    assert command("name", Options, lambda o: o.number, ["--number", "7"]) == 7


@dataclass(frozen=True)
class Paths:
    data: Path
    """A path."""

    more: tuple[Path, ...] = ()
    """Paths."""

    resume: str = "auto"
    """A path, or auto."""


def test_the_home_folder_is_meant_where_no_shell_has_put_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--data=~/a", "--more", "~/b", "~", "c~/d", "--resume", "~/e.pt"]
    found = parse_options(Paths, [Paths], words)
    home = Path("/home/me")
    assert found == Paths(home / "a", (home / "b", home, Path("c~/d")), "/home/me/e.pt")
    assert parse_options(Paths, [Paths], ["--data", "~no-such-user/x"]).data == Path(
        "~no-such-user/x"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--number", "x"], "--number"), (["--numbr", "3"], "did you mean --number"), (["3"], "3")],
)
def test_a_mistyped_command_is_one_line(capsys, words, message):
    assert command("name", Options, lambda o: o.number, words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


@dataclass(frozen=True)
class Unset:
    rate: float | None = None
    """A number, or what is computed."""

    sizes: tuple[int, ...] | None = None
    """Numbers, or all."""

    limit: float = 1.0
    """A number."""

    kind: Literal["a", "b"] | None = None
    """A word, or what is computed."""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "0,01"], "--rate: FLOAT is needed, not '0,01'"),
        (["--sizes", "x"], "--sizes: INT [INT ...] is needed, not 'x'"),
        (["--limit", "x"], "--limit: could not convert string to float: 'x'"),
        (["--kind", "c"], "invalid choice 'c' for argument '--kind'"),
    ],
)
def test_a_wrong_value_is_answered_with_what_the_option_takes(words, message):
    with pytest.raises(UsageError) as raised:
        parse_options(Unset, [Unset], words)
    assert str(raised.value).startswith(message)
    assert "None" not in str(raised.value)


@pytest.mark.parametrize("error", [AttributeError("half imported"), UsageError("no such network")])
def test_an_error_after_a_ctrl_c_that_a_library_swallowed_is_the_interruption(capsys, error):
    before = signal.getsignal(signal.SIGINT)

    def action() -> int:
        with contextlib.suppress(KeyboardInterrupt):  # as torch while it imports NumPy
            signal.raise_signal(signal.SIGINT)
        raise error

    assert exit_code("name", action) == 130
    assert capsys.readouterr().err == "name: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_without_a_ctrl_c_stays_what_it_is():
    def action() -> int:
        raise AttributeError("a fault of ours")

    with pytest.raises(AttributeError, match="a fault of ours"):
        exit_code("name", action)

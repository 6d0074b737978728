"""Progress without a terminal: plain lines; on one that is wide enough: a bar."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios

import pytest

from pipelines.utils import progress
from pipelines.utils.progress import ProgressBar, StreamConsole, format_bytes, format_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Set what each call of the clock returns, in seconds."""

    def set_times(*times: float) -> None:
        pending = iter(times)
        monkeypatch.setattr(progress.time, "perf_counter", lambda: next(pending))

    return set_times


def _times(lines: list[str]) -> list[str]:
    return [" ".join(re.findall(r"\d+:\d\d:\d\d", line)) for line in lines]


def test_without_a_terminal_there_is_a_plain_line_now_and_then(clock, capsys):
    clock(0.0, 1.0, 11.0, 12.0, 22.0)
    with ProgressBar("train", 1000) as shown:
        for done in (40, 440, 480, 880):
            shown.update(done, done * 100_000, bad=1)
    assert capsys.readouterr().err.splitlines() == [
        "train: 440/1000, 40 images/s, 0:00:14 left, 44 MB, 1 bad",
        "train: 880/1000, 40 images/s, 0:00:03 left, 88 MB, 1 bad",
    ]


def test_the_first_update_gives_an_estimate_and_counts_no_more_when_there_are_others(clock):
    """It may compile for a minute."""
    lines: list[str] = []
    clock(0.0, 60.0, 61.0, 62.0)
    with ProgressBar("epoch 1/2", 12, later=20, line=lines.append) as shown:
        for done in (1, 2, 3):
            shown.update(done, prints=True)
    assert _times(lines) == ["0:11:00 0:31:00", "0:00:10 0:00:30", "0:00:09 0:00:29"]


def test_the_speed_is_that_of_the_last_half_minute(clock):
    lines: list[str] = []
    clock(*[float(t) for t in range(101)], 110.0, 120.0, 130.0, 140.0)
    with ProgressBar("epoch 1/2", 1000, line=lines.append) as shown:
        for done in range(1, 105):  # one a second, then one in ten
            shown.update(done, prints=True)
    assert lines[99].startswith("epoch 1/2: 100/1000, 1.0 images/s, 0:15:00 left")
    assert lines[103].startswith("epoch 1/2: 104/1000, 0.1 images/s, 2:29:20 left")


def test_what_was_done_before_is_not_taken_for_this_pass_s_speed(clock):
    lines: list[str] = []
    clock(0.0, 1.0, 2.0)
    with ProgressBar("epoch 2/2", 100, images=32, done=90, line=lines.append) as shown:
        shown.update(91, prints=True)
        shown.update(92, prints=True)
    assert lines[1] == "epoch 2/2: 92/100, 32 images/s, 0:00:08 left"


def test_lines_that_nobody_asked_for_come_after_10_seconds_and_then_as_often_as_is_said(clock):
    lines: list[str] = []
    clock(0.0, 9.0, 10.0, 20.0, 69.0, 70.0)
    with ProgressBar("val", 9, every=60, line=lines.append) as shown:
        for done in range(1, 6):
            shown.update(done)
    assert [line.split(",")[0] for line in lines] == ["val: 2/9", "val: 5/9"]


def test_on_a_terminal_there_is_a_bar_with_the_numbers_below_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    with ProgressBar("val [x]", 10, later=90) as shown:
        shown.update(7, 3_000_000, bad=2, info="[no markup]")
    *_, bar, numbers, _end = re.sub(r"\x1b\[[\d;?]*\w", "", terminal.getvalue()).split("\n")
    assert re.match(r".*val \[x\] ━+.* 7/10 0:00:00 left, 0:00:0\d of the run", bar)
    assert re.match(r"  \d+ images/s, 3 MB, 2 bad, \[no markup\]", numbers)


@pytest.mark.parametrize(
    ("variables", "is_terminal"),
    [
        ({"TERM": "dumb"}, True),
        ({"TERM": ""}, True),
        ({"TERM": "xterm", "COLUMNS": "71"}, True),
        ({"TERM": "xterm", "FORCE_COLOR": "1"}, False),
        ({"TERM": "xterm", "TTY_COMPATIBLE": "1"}, False),
    ],
    ids=["dumb", "unknown", "narrow", "pipe with FORCE_COLOR", "pipe with TTY_COMPATIBLE"],
)
def test_where_no_bar_can_be_drawn_there_are_plain_lines(monkeypatch, variables, is_terminal):
    stream = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with ProgressBar("val", 10) as shown:
        shown.update(7, prints=True)
    assert stream.getvalue().startswith("val: 7/10, ")
    assert "\x1b" not in stream.getvalue()


def test_the_width_is_that_of_the_streams_own_terminal(monkeypatch):
    """Also where stdin, stdout and stderr are none."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 123, 0, 0))
    with os.fdopen(child, "w") as stream:
        assert StreamConsole(stream).width == 123
    os.close(parent)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (137.8e9, "138 GB"), (2e15, "2000 TB")],
)
def test_sizes_are_readable(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.9, "0:00:00"), (754, "0:12:34"), (457_384, "127:03:04")]
)
def test_durations_are_hours_minutes_and_seconds_also_of_days(seconds, text):
    assert format_seconds(seconds) == text

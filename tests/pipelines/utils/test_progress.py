"""Progress without a terminal: plain lines; on one: a bar."""

from __future__ import annotations

import io

import pytest

from pipelines.utils import progress
from pipelines.utils.progress import ProgressBar, format_bytes


def test_without_a_terminal_there_is_a_plain_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 11.0, 12.0, 22.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with ProgressBar("train", 1000) as shown:
        for done in (100, 440, 480, 880):
            shown.update(done, done * 100_000, bad=1)
    assert capsys.readouterr().err.splitlines() == [
        "train: 440/1000, 40 images/s, 00:00:14 left, 44 MB, 1 bad",
        "train: 880/1000, 40 images/s, 00:00:03 left, 88 MB, 1 bad",
    ]


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    with ProgressBar("val", 10) as shown:
        shown.update(7, 3_000_000, bad=2)
    text = progress.sys.stderr.getvalue()
    assert "7/10" in text
    assert "3 MB, 2 bad" in text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (137.8e9, "138 GB"), (2e15, "2000 TB")],
)
def test_sizes_are_readable(size, text):
    assert format_bytes(size) == text

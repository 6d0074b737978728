"""What the console shows of a run."""

from __future__ import annotations

import io
import os
import sys

import pytest

from pipelines.utils import progress
from pipelines.utils.cli import exit_code
from rsnet.loggers.console import ConsoleLogger
from rsnet.loggers.run_dir import RunDir
from rsnet.loggers.run_logger import TrainingProgress, losses_in_words
from rsnet.training import loss_meter
from tests.helpers import synthetic_run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_logged_step_is_a_plain_line(capsys):
    console = ConsoleLogger(True)
    console.start("epoch 1/2", 4, images=8)
    console.update(2, "lr 0.1", prints=True)
    console.update(3, "lr 0.1")
    console.update(4, "lr 0.1", prints=True)
    console.say("[no markup]")
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1/2: 2/4, ")
    assert first.endswith(" images/s, 0:00:00 left, lr 0.1")
    assert second.startswith("epoch 1/2: 4/4, ")
    assert last == "[no markup]"


def test_messages_stand_above_the_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    console = ConsoleLogger(True)
    console.start("epoch 1/2", 4, images=8)
    console.update(3, "lr 0.1")
    console.say("a message")
    console.stop()
    shown = terminal.getvalue()
    assert "━" in shown
    assert shown.index("a message") < shown.rindex("3/4")
    assert "lr 0.1" in shown


def test_ranks_that_are_not_the_first_say_nothing(capsys):
    console = ConsoleLogger(False)
    console.start("x", 2, images=1)
    console.update(1, "y", prints=True)
    console.say("z")
    assert capsys.readouterr().out == ""


def test_a_console_that_is_lost_is_said_in_the_runs_own_log(tmp_path, monkeypatch):
    run = RunDir(tmp_path, continues=False, active=True)
    reader, writer = os.pipe()
    os.close(reader)
    file = open(writer, "wb", closefd=False)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file))

    def train() -> int:
        console = ConsoleLogger(True)
        console.log = run.note
        for epoch in (1, 2):
            console.start(f"epoch {epoch}/2", 1, images=1)
            console.update(1, "lr 0.5", prints=True)
            console.say(f"epoch {epoch}/2")
        return 0

    assert exit_code("train_dali.py", train) == 0
    lines = [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines()]
    os.close(writer)
    assert lines == [
        "stdout is lost (Broken pipe): the training goes on without", "epoch 1/2", "epoch 2/2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("terms", "skipped", "words"),
    [
        (
            {"ce/96": 2.5, "ce/224": 1.25, "ce/160": 9.0, "ce/ensemble": 7.0, "total": 20.0},
            0,
            "cross-entropy 1.250 at 224, 2.500 at 96, lr 0.05",
        ),
        (
            {"ce/32": 0.5, "ce/ensemble": 0.5, "total": 1.0},
            3,
            "cross-entropy 0.500 at 32, lr 0.05, 3 updates skipped",
        ),
        (
            {"bce/32": 0.5, "bce/16": 0.6, "bce/ensemble": 0.5, "kd": 0.1, "total": 1.7},
            0,
            "binary cross-entropy 0.500 at 32, 0.600 at 16, lr 0.05",
        ),
    ],
    ids=["several sizes", "one size", "binary"],
)
def test_losses_are_the_cross_entropies_of_the_largest_and_the_smallest_size(terms, skipped, words):
    p = TrainingProgress(
        step=1, steps_in_epoch=1, lr=0.05, terms=terms, images_per_s=1.0, data_time=0.0, step_time=1.0,
        skipped=skipped,
    )  # fmt: skip
    assert losses_in_words(p) == words


def test_the_bar_moves_with_every_update_and_the_device_is_asked_at_the_logged_steps_alone(
    tmp_path, monkeypatch
):
    shown: list[tuple[str, int, str]] = []
    computed: list[int] = []
    compute = loss_meter.LossMeter.compute

    def update(self, done, **more):
        shown.append((self._title, done, more["info"]))

    def counted(self):
        computed.append(len(shown))
        return compute(self)

    monkeypatch.setattr(progress.ProgressBar, "update", update)
    monkeypatch.setattr(loss_meter.LossMeter, "compute", counted)
    synthetic_run.train(tmp_path / "run", "--epochs", "1", "--log-interval", "4")
    epoch = [(done, "cross-entropy" in info) for title, done, info in shown if "epoch" in title]
    before, after = [(done, False) for done in (1, 2, 3)], [(done, True) for done in (5, 6, 7)]
    assert epoch == [*before, (4, True), (4, True), *after, (8, True), (8, True)]
    assert len(computed) == 2


def test_the_time_left_of_the_run_counts_the_epochs_and_evaluations_that_follow(
    tmp_path, monkeypatch
):
    later: list[float | None] = []
    begin = ConsoleLogger.start

    def start(self, title, total, **more):
        if "epoch" in title:
            later.append(more["later"])
        begin(self, title, total, **more)

    monkeypatch.setattr(ConsoleLogger, "start", start)
    synthetic_run.train(tmp_path / "run", "--epochs", "2")
    # An epoch of 8 updates, and two evaluations of 2 batches, a third of an update's work each.
    assert later[0] == pytest.approx(8 + 2 * 2 / 3)
    assert later[1] is not None
    assert later[1] > 0  # the evaluation as it was measured

"""Runs that are really killed, and end as if they had not been."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.faults import (  # fmt: skip
    assert_same_end,
    command,
    end,
    finish,
    kill,
    reached,
    start,
    step,
    wait_for,
)

pytestmark = pytest.mark.faults


def _killed_at(words: list[str], run: Path, n: int, number: int = signal.SIGKILL) -> str:
    """Start, kill behind logged step `n`; returns stderr."""
    process = start(words)
    wait_for(reached(run, n), process)
    kill(process, number)
    _, err = end(process, None)
    assert process.returncode != 0
    return err


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(photos, whole, tmp_path):
    run = tmp_path / "run"
    words = command(photos, run)
    for n in (2, 10, 14):  # 10: the end of an epoch, before its evaluation
        _killed_at(words, run, n)
    out, _ = finish(words)
    assert "resumed" in out
    assert_same_end(run, whole)


@pytest.mark.slow
def test_a_quantized_run_that_is_killed_ends_as_one_that_was_not(photos, tmp_path):
    """The bases and what their moving averages remember are part of the state."""
    quantized = ("--mode", "preact", "--qw", "2", "--qa", "2", "--accumulate", "2", "-b", "2")
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(command(photos, whole, *quantized))
    words = command(photos, run, *quantized)
    for n in (2, 8):  # in the first and in the second epoch
        _killed_at(words, run, n)
    finish(words)
    assert_same_end(run, whole)


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(photos, tmp_path):
    """A random part of a second behind a random step: in a step, a save, an evaluation, between two."""
    long = ("--epochs", "8")
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(command(photos, whole, *long))
    draws = random.Random(0)
    for _ in range(10):
        process = start(command(photos, run, *long))
        behind = step(run) + draws.randrange(1, 3)
        wait_for(reached(run, behind), process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draws.uniform(0, 0.15))
        assert process.poll() is None, "it was too fast to be killed"
        kill(process)
        end(process, None)
    finish(command(photos, run, *long))
    assert_same_end(run, whole)

"""Several processes: they stop at the same step, go on in other numbers, and a lost one is named."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.faults import (
    UPDATES,
    assert_same_end,
    command,
    end,
    finish,
    kill,
    metrics,
    saved,
    start,
    torchrun,
    wait_for,
)  # fmt: skip

pytestmark = pytest.mark.faults


def _pair(photos: Path, run: Path, *more: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """Two processes with half of the batch each."""
    return torchrun(2, command(photos, run, "-b", "2", *more), *launcher)


@pytest.fixture(scope="module")
def pair(photos, tmp_path_factory) -> Path:
    """A run of two processes that nothing happens to."""
    run = tmp_path_factory.mktemp("pair") / "run"
    finish(_pair(photos, run))
    assert saved(run)["step"] == UPDATES
    return run


def _until(run: Path, step: int):
    return lambda: bool(metrics(run)) and metrics(run)[-1]["step"] >= step


def _ranks(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id of the trainers below torchrun."""
    found = {}
    for child in _children(process.pid):
        environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [e for e in environ if e.startswith(b"RANK=")]
        if ranks and b"train_dali.py" in Path(f"/proc/{child}/cmdline").read_bytes():
            found[int(ranks[0][5:])] = child
    return found


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_ranks_that_are_told_to_stop_stop_at_the_same_step_and_go_on_exactly(
    photos, pair, tmp_path
):
    """SIGTERM to torchrun, which passes it on; each rank's own BatchNorm statistics are kept, too."""
    run = tmp_path / "run"
    process = start(_pair(photos, run))
    wait_for(_until(run, 7), process)
    process.send_signal(signal.SIGTERM)
    _, err = end(process, None)
    assert err.count("stopped by SIGTERM: saved after update") == 1
    assert 7 <= saved(run)["step"] < UPDATES
    # A signal to one rank alone stops all.
    process = start(_pair(photos, run))
    wait_for(_until(run, 12), process)
    os.kill(_ranks(process)[1], signal.SIGUSR1)
    _, err = end(process, None)
    assert err.count("stopped by SIGUSR1: saved after update") == 1
    finish(_pair(photos, run))
    assert_same_end(run, pair)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_a_restart_goes_on_exactly(photos, pair, tmp_path):
    run = tmp_path / "run"
    process = start(_pair(photos, run, launcher=("--max-restarts", "1")))
    wait_for(_until(run, 7), process)
    os.kill(_ranks(process)[1], signal.SIGKILL)
    end(process)
    assert_same_end(run, pair)


@pytest.mark.slow
def test_a_killed_rank_without_restarts_ends_all(photos, tmp_path):
    run = tmp_path / "run"
    process = start(_pair(photos, run))
    wait_for(_until(run, 7), process)
    os.kill(_ranks(process)[1], signal.SIGKILL)
    _, err = end(process, None)
    assert process.returncode != 0
    assert "rank      : 1" in err  # torchrun's report
    assert "Traceback" not in err.split("torch.distributed.elastic")[0]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_in_time_and_is_named(photos, tmp_path):
    run = tmp_path / "run"
    process = start(_pair(photos, run, "--timeout", "8"))
    wait_for(_until(run, 7), process)
    stopped = _ranks(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    _, err = end(process, None)
    assert process.returncode != 0
    assert "rank 1 ended, or hangs, or is not connected any longer" in err
    assert not Path(f"/proc/{stopped}").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(photos, pair, tmp_path, before, after):
    """The images of every update stay the same, so the weights are those of the run with two: not to the
    bit, as one process with two batches adds up in another order."""
    run = tmp_path / "run"
    commands = {
        1: command(photos, run, "-b", "2", "--accumulate", "2"),
        2: _pair(photos, run),
    }
    process = start(commands[before])
    wait_for(_until(run, 7), process)
    process.send_signal(signal.SIGTERM)
    end(process, None)
    words = commands[after]
    while "-b" in words or "--accumulate" in words:  # left to what keeps the images of an update
        i = next(i for i, w in enumerate(words) if w in ("-b", "--accumulate"))
        words = words[:i] + words[i + 2 :]
    out, _ = finish(words)
    assert f"{before} processes then, {after} now" in out
    ended, expected = saved(run), saved(pair)
    assert ended["step"] == expected["step"]
    torch.testing.assert_close(
        ended["model"]["alpha"], expected["model"]["alpha"], rtol=1e-3, atol=1e-3
    )


def test_another_number_of_images_in_an_update_is_refused(photos, pair):
    words = command(photos, pair, "-b", "4", "--accumulate", "2")
    _, err = finish(words, 2)
    assert "other options (--lr 0.0015625 -> 0.003125, global batch 4 -> 8)" in err
    _, err = finish([*words, "--resume", "auto"], 2)
    assert "global batch 4 -> 8: the run would not go on with the images that come next" in err
    assert "--allow-change global-batch" in err


@pytest.mark.slow
def test_processes_that_are_killed_leave_none_behind(photos, tmp_path):
    run = tmp_path / "run"
    process = start(_pair(photos, run))
    wait_for(_until(run, 3), process)
    ranks = list(_ranks(process).values())
    kill(process, signal.SIGKILL)
    end(process, None)
    deadline = time.monotonic() + 30
    while any(map(_lives, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_lives, ranks))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

"""How runs end: with nothing left behind; and that every backend goes on exactly."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.conftest import needs_ffcv
from tests.helpers.faults import (
    assert_same_end,
    command,
    end,
    finish,
    kill,
    reached,
    start,
    wait_for,
)

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SCRIPTS = ["train_dali.py", pytest.param("train_ffcv.py", marks=needs_ffcv)]


@pytest.fixture(scope="module")
def data(photos, tmp_path_factory, request) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("beton")
    found = {"train_dali.py": photos}
    words = ["-m", "pipelines.beton", "--data", str(photos), "--output", str(folder)]
    if request.config.getoption("collectonly") is False:
        finish([command(photos, folder)[0], *words], None)
    found["train_ffcv.py"] = folder
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_ten_finished_runs_end_and_leave_nothing(data, tmp_path, script):
    shared = {p.name for p in Path("/dev/shm").iterdir()}
    for i in range(10):
        run = tmp_path / str(i)
        process = start(command(data[script], run, "--epochs", "1", script=script))
        wait_for(lambda r=run: (r / "results.json").exists(), process)
        end(process)
        assert not _session(process.pid)
    assert {p.name for p in Path("/dev/shm").iterdir()} <= shared


def _session(pid: int) -> list[str]:
    """Processes that are left of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_run_of_each_backend_goes_on_exactly(data, tmp_path, script):
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(command(data[script], whole, script=script))
    words = command(data[script], run, script=script)
    for n, number in ((3, signal.SIGKILL), (9, signal.SIGTERM), (14, signal.SIGKILL)):
        process = start(words)
        wait_for(reached(run, n), process)
        kill(process, number)
        end(process, None)
    finish(words)
    assert_same_end(run, whole)

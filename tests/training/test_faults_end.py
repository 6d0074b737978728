"""How runs end: with nothing left behind; and that every backend goes on exactly."""

from __future__ import annotations

import contextlib
import signal
import time
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
def test_finished_runs_end_and_leave_nothing(data, tmp_path, script):
    before = _unused()
    for i in range(4):
        run = tmp_path / str(i)
        process = start(command(data[script], run, "--epochs", "1", script=script))
        wait_for(lambda r=run: (r / "results.json").exists(), process)
        end(process)
        assert not _session(process.pid)
    left = _unused() - before
    time.sleep(0.5)
    assert not left & _unused()  # a neighbour may have been about to open its file


def _unused() -> set[str]:
    """Files of /dev/shm that no process has open or mapped: what others use there is not left behind."""
    used = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used |= {line.split("/dev/shm/")[1].split()[0] for line in _in_shared(folder)}
    return {p.name for p in Path("/dev/shm").iterdir()} - used


def _in_shared(process: Path) -> list[str]:
    lines = (process / "maps").read_text().splitlines()
    for entry in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            lines.append(str(entry.readlink()))
    return [line for line in lines if "/dev/shm/" in line]


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

"""TensorBoard's files, read back by TensorBoard."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from pipelines.utils.errors import DataError, UsageError
from rsnet.__main__ import main
from rsnet.loggers import tensorboard_logger
from rsnet.loggers.run_dir import RunDir
from rsnet.loggers.tensorboard_logger import TensorBoardLogger, rewrite
from tests.helpers import faults, synthetic_run

Point = tuple[int, float, str, float]  # step, time, name, value in float32


def _lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _expected(run: Path) -> list[Point]:
    return [
        (line["step"], line["time"], name, pytest.approx(value, rel=1e-6))
        for line in _lines(run)
        for name, value in line.items()
        if name not in ("step", "time")
    ]


def _events(run: Path) -> list[Event]:
    (path,) = (run / "tensorboard").iterdir()
    return [Event.FromString(data) for data in RawEventFileLoader(str(path)).Load()]


def _points(run: Path) -> list[Point]:
    return [
        (event.step, event.wall_time, value.tag, value.simple_value)
        for event in _events(run)
        for value in event.summary.value
    ]


def _run(path: Path, steps: range) -> RunDir:
    run = RunDir(path, continues=True, active=True)
    for step in steps:
        run.append_metrics({"step": step, "epoch": step / 4, "train/total": 1 / step})
    return run


def test_a_training_s_events_are_its_metrics(tmp_path):
    run = tmp_path / "run"
    synthetic_run.train(run, "--epochs", "2", "--log-interval", "4", "--tensorboard")
    points = _points(run)
    assert points == _expected(run)
    assert {"lr", "epoch", "train/ce/16", "val/top1@ensemble"} <= {name for _, _, name, _ in points}
    assert {step for step, *_ in points} == {4, 8, 12, 16}


def test_a_run_that_was_killed_and_resumed_has_every_step_once(tmp_path, monkeypatch):
    """Of those that are done again the second time's alone, and of a record that was cut short nothing."""
    said: list[str] = []
    run = _run(tmp_path, range(1, 3))
    killed = TensorBoardLogger(tmp_path, True, said.append)
    for step in (3, 4, 5):
        killed.log(run.append_metrics({"step": step, "epoch": step / 4, "train/total": 7.0}))
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert len(_points(tmp_path)) == 2 * 5  # all that was logged is there at once
    killed.close()
    path.write_bytes(path.read_bytes()[:-3])
    monkeypatch.setattr(tensorboard_logger.time, "time", lambda: 2e9)  # another file's name
    run.rewind(3 / 4, 0)
    resumed = TensorBoardLogger(tmp_path, True, said.append)
    for step in (4, 5, 6):
        resumed.log(run.append_metrics({"step": step, "epoch": step / 4, "train/total": 1 / step}))
    resumed.close()
    assert [p[0] for p in _points(tmp_path) if p[2] == "train/total"] == [1, 2, 3, 4, 5, 6]
    assert _points(tmp_path) == _expected(tmp_path)
    assert not said


@pytest.mark.faults
@pytest.mark.slow
def test_a_process_that_was_killed_and_the_same_command_leave_every_step_once(photos, tmp_path):
    run = tmp_path / "run"
    command = faults.command(photos, run, "--tensorboard", "--checkpoint-every", "3")
    process = faults.start(command)
    faults.wait_for(faults.reached(run, 7), process)
    faults.kill(process)
    process.communicate()
    faults.finish(command)
    assert _points(run) == _expected(run)
    assert max(step for step, *_ in _points(run)) == faults.UPDATES


def test_a_tensorboard_that_shows_the_run_drops_what_it_had_read(tmp_path):
    _run(tmp_path, range(1, 3))
    rewrite(tmp_path)
    version, restart, *_ = _events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (restart.session_log.status, restart.step) == (restart.session_log.START, 0)


def test_a_run_without_the_option_has_no_events(tmp_path):
    TensorBoardLogger(tmp_path, False, print).log({"step": 1, "time": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_disk_that_does_not_take_events_ends_nothing_and_is_said_once(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    said: list[str] = []
    run = _run(tmp_path, range(1, 3))
    events = TensorBoardLogger(tmp_path, True, said.append)
    monkeypatch.setattr(tensorboard_logger, "_write", fail)
    for line in _lines(tmp_path):
        events.log(line)
    events.close()
    TensorBoardLogger(tmp_path, True, said.append).close()
    assert len(said) == 2
    for line in said:
        assert re.fullmatch(
            r"TensorBoard: lost \(.*No space left on device\); `rsnet sync .*", line
        )
    monkeypatch.undo()
    assert rewrite(run.path) == 2
    assert _points(tmp_path) == _expected(tmp_path)


def test_files_of_others_in_the_folder_stay(tmp_path):
    _run(tmp_path, range(1, 3))
    theirs = tmp_path / "tensorboard" / "events.out.tfevents.1.host.theirs"
    theirs.parent.mkdir()
    theirs.touch()
    rewrite(tmp_path)
    assert theirs.exists()


def test_sync_writes_the_events_of_a_run_that_was_trained_without(tmp_path, capsys):
    _run(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')  # cut short by a crash
    assert main(["sync", str(tmp_path), "--only", "tensorboard"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 3 lines of metrics written for TensorBoard\n"
    assert [p[0] for p in _points(tmp_path) if p[2] == "epoch"] == [1, 2, 3]


def test_sync_refuses_what_is_no_run_is_damaged_or_is_being_trained(tmp_path):
    with pytest.raises(UsageError, match="there are no metrics"):
        rewrite(tmp_path)
    run = _run(tmp_path, range(1, 4))
    with run.alone(), pytest.raises(UsageError, match="a process that still runs trains in it"):
        rewrite(tmp_path)
    for damage in ('{"epoch": 1}\n', "{]\n", "[]\n", '{"step": "x", "time": 1}\n'):
        (tmp_path / "metrics.jsonl").write_text(damage)
        with pytest.raises(DataError, match="damaged"):
            rewrite(tmp_path)


def test_a_record_that_a_full_disk_takes_a_part_of_is_not_there_at_all(tmp_path):
    path = tmp_path / "events"

    class Full(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[:5])

    with Full(path, "ab") as file, pytest.raises(OSError, match="No space left"):
        tensorboard_logger._write(file, Event(wall_time=1.0, step=2))
    assert path.read_bytes() == b""

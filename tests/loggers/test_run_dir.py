"""The run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from pipelines.utils import output
from pipelines.utils.errors import RunError, UsageError
from rsnet.loggers import run_dir
from rsnet.loggers.run_dir import RunDir, environment, run_directory
from rsnet.release.from_run import release_run
from tests.helpers.runs import write_run

ROOT = Path(__file__).parents[2]


def test_a_log_that_the_disk_does_not_take_ends_nothing(tmp_path, monkeypatch):
    run = RunDir(tmp_path, continues=False, active=True)
    monkeypatch.setattr(Path, "open", _no_space)
    run.note("epoch 1/2")


def test_metrics_are_one_json_line_each(tmp_path):
    run = RunDir(tmp_path / "run", continues=False, active=True)
    run.append_metrics({"step": 1, "lr": 0.5})
    run.append_metrics({"step": 2, "lr": 0.25})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == [0.5, 0.25]


def test_metrics_of_an_abandoned_epoch_are_moved_aside(tmp_path):
    run = RunDir(tmp_path, continues=False, active=True)
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "epoch": step / 3})
    run.append_text("metrics.jsonl", '{"step": 4, "lr":')  # cut short by a crash
    run.rewind(2 / 3, 0)
    kept, abandoned = (
        (tmp_path / name).read_text().splitlines()
        for name in ("metrics.jsonl", "metrics.abandoned.jsonl")
    )
    assert [json.loads(line)["step"] for line in kept] == [1, 2]
    assert json.loads(abandoned[0])["step"] == 3
    assert abandoned[1] == '{"step": 4, "lr":'


def test_an_evaluation_that_will_be_done_again_is_moved_aside_too(tmp_path):
    """It has the epoch of the update before it."""
    run = RunDir(tmp_path, continues=False, active=True)
    run.append_metrics({"step": 5, "epoch": 1.0, "train/total": 1.0})
    run.append_metrics({"step": 5, "epoch": 1, "val/top1@32": 50.0})
    run.rewind(1.0, 0)
    (kept,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "train/total" in kept


def test_metrics_that_a_full_disk_does_not_take_end_the_run_or_are_said(tmp_path, monkeypatch):
    run = RunDir(tmp_path, continues=False, active=True)
    monkeypatch.setattr(Path, "open", _no_space)
    with pytest.raises(
        RunError, match=r"cannot write to .*metrics\.jsonl: No space left on device"
    ):
        run.append_metrics({"step": 1})
    said: list[str] = []
    run.on_error = said.append
    run.append_metrics({"step": 1})
    assert said == [f"cannot write to {tmp_path / 'metrics.jsonl'}: No space left on device"]


def test_what_a_full_disk_took_of_a_line_is_not_in_the_way_of_the_next(tmp_path):
    """A file that may not grow further takes a part of a write, as a full disk does."""
    run = RunDir(tmp_path, continues=False, active=True)
    said: list[str] = []
    run.on_error = said.append
    run.append_metrics({"step": 1})
    path = tmp_path / "metrics.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
        run.append_metrics({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    run.append_metrics({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]
    assert len(said) == 1


def test_what_wandb_has_of_abandoned_lines_is_not_counted_as_the_runs(tmp_path):
    run = RunDir(tmp_path, continues=False, active=True)
    for step in (1, 2):
        run.append_metrics({"step": step, "epoch": step})
    content = {"id": "x", "entity": None, "lines": 2}
    run.write_json("wandb.json", content)
    run.rewind(2, 2)
    assert json.loads((tmp_path / "wandb.json").read_text()) == content
    run.rewind(1, 1)
    assert json.loads((tmp_path / "wandb.json").read_text()) == content | {"lines": 0}


def _no_space(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_finished_run_is_only_entered_to_continue_it(tmp_path):
    RunDir(tmp_path, continues=False, active=True)
    RunDir(tmp_path, continues=False, active=True).append_metrics({"step": 1})
    with pytest.raises(UsageError, match="holds a run already"):
        RunDir(tmp_path, continues=False, active=True)
    RunDir(tmp_path, continues=True, active=True)


def test_a_folder_with_a_checkpoint_alone_is_not_a_new_runs(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.pt").touch()
    with pytest.raises(UsageError, match="holds a run already"):
        RunDir(tmp_path, continues=False, active=True)
    RunDir(tmp_path, continues=True, active=True)


def test_the_repository_that_the_trainer_is_installed_in_is_not_taken_for_its_own(
    tmp_path, monkeypatch
):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], [*who, "commit", "--quiet", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    installed = tmp_path / "site-packages" / "run_dir.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(run_dir, "__file__", str(installed))
    assert environment(torch.device("cpu"), 1)["git_sha"] is None


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_where_there_are_no_locks_it_is_said_once_and_a_killed_run_leaves_none(
    tmp_path, monkeypatch, capsys, number
):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(output, "_noted", set())
    monkeypatch.setattr(fcntl, "flock", flock)
    killed, next_ = (RunDir(tmp_path, continues=True, active=True) for _ in range(2))
    with killed.alone(), next_.alone():
        pass
    assert capsys.readouterr().err == (
        f"note: {tmp_path / 'lock'}: no lock can be held ({os.strerror(number)}); "
        "do not start a second command of this kind there\n"
    )


def test_the_environment_names_versions_device_and_commit():
    env = environment(torch.device("cpu"), 2)
    assert env["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert any(name.startswith("nvidia-dali") for name in env["packages"])
    assert env["world_size"] == 2
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    assert (env["git_sha"] or "").rstrip("+") == head


def test_a_run_is_named_by_its_directory_and_by_what_lies_in_it(tmp_path):
    run = write_run(tmp_path / "run")
    for name in (".", "checkpoints", "checkpoints/best.pt"):
        assert run_directory(run / name).resolve() == run
    release_run(run, tmp_path / "release")
    with pytest.raises(UsageError, match="is a release, without the metrics of its training"):
        run_directory(tmp_path / "release")
    with pytest.raises(UsageError, match="lies in no run, whose metrics are needed"):
        run_directory(tmp_path / "release" / "config.json")


@pytest.mark.parametrize("continues", [False, True])
def test_a_folder_of_something_else_is_not_written_into(tmp_path, continues):
    """A release's config.json was replaced by the run's options."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UsageError, match=r"--output: .* holds no run, but config.json; give another"
    ):
        RunDir(tmp_path, continues=continues, active=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_file_of_an_earlier_end_is_set_aside(tmp_path):
    run = RunDir(tmp_path, continues=False, active=True)
    run.set_aside("results.json")  # there is none
    run.write_json("results.json", {"32": 1})
    run.set_aside("results.json")
    assert not (tmp_path / "results.json").exists()
    assert json.loads((tmp_path / "results.json.earlier").read_text()) == {"32": 1}


def test_a_folder_of_other_things_does_not_become_a_run(tmp_path):
    (tmp_path / "runs" / "first" / "checkpoints").mkdir(parents=True)
    with pytest.raises(
        UsageError, match=r"^--output: .*/runs holds other files \(first\); name a folder"
    ):
        RunDir(tmp_path / "runs", continues=False, active=True)
    assert not (tmp_path / "runs" / "metrics.jsonl").exists()
    (tmp_path / "new" / "lost+found").mkdir(parents=True)
    for name in (".gitkeep", "libraries.log", "train.log", "slurm-12.out", "model_best.pth.tar"):
        (tmp_path / "new" / name).touch()
    RunDir(tmp_path / "new", continues=False, active=True)


def test_a_run_whose_folder_is_renamed_ends_with_the_way_on(tmp_path):
    run = RunDir(tmp_path / "run", continues=False, active=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(
        RunError, match="the run's folder is gone, or has another name: --output NAME"
    ):
        run.append_text("metrics.jsonl", "{}")

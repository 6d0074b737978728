"""train_dali.py as a user calls it: a run, its files, what it continues, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from pipelines.dali import DaliOptions, make_loaders
from pipelines.dali.loader import DaliLoader
from rsnet.checkpoint import io as checkpoint
from rsnet.loggers.run_dir import RunDir
from rsnet.train import main
from rsnet.training import run as session
from tests.conftest import write_folder
from tests.helpers import processes

ROOT = Path(__file__).parents[2]
RUN = [
    "--arch",
    "parallel_resnet18",
    "--width-mult",
    "0.125",
    "--sizes",
    "32",
    "24",
    "--workers",
    "1",
]
RUN += ["--batch-size", "8"]


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """Run a command line in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train_dali.py", *map(str, arguments)])
        code = main("train_dali.py", DaliOptions, make_loaders)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def _metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory) -> Path:
    """A run of two epochs, by the real script in a process of its own."""
    run = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, ROOT / "train_dali.py", "--data", photos, *RUN, "--output", run]
    done = processes.run([*command, "--epochs", "2", "--wandb", "disabled", "--log-interval", "1"])
    assert done.returncode == 0, done.stderr
    (run / "stdout.txt").write_text(done.stdout)
    return run


def test_a_run_leaves_its_files(trained):
    for name in ("command.txt", "config.json", "env.json", "results.json", "accuracy_gmacs.png"):
        assert (trained / name).stat().st_size > 0, name
    for name in ("last.pt", "best.pt", "last.pt.sha256", "best.pt.sha256"):
        assert (trained / "checkpoints" / name).exists()
    env = json.loads((trained / "env.json").read_text())
    assert env["packages"]["torch"] == torch.__version__.split("+")[0]
    assert json.loads((trained / "config.json").read_text())["lr"] == pytest.approx(0.1 * 8 / 256)
    assert "--lr 0.003125" in (trained / "command.txt").read_text()


def test_a_run_notes_its_command_and_prints_its_batch_and_its_table(trained):
    out = (trained / "stdout.txt").read_text()
    assert "python train_dali.py --data" in (trained / "command.txt").read_text()
    assert "--no-blurpool" not in out
    assert "global batch  8 = 8 images x 1 processes x 1 accumulated; 2 steps an epoch" in out
    table = out[out.index("size  GMACs") :].splitlines()
    assert [row.split()[0] for row in table[1:4]] == ["32", "24", "ensemble"]


def test_metrics_have_every_term_and_accuracy(trained):
    lines = _metrics(trained)
    training = [line for line in lines if "lr" in line]
    evaluations = [line for line in lines if "val/top1@32" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    assert [line["epoch"] for line in evaluations] == [1, 2]
    terms = {"ce/32", "ce/24", "ce/ensemble", "kd", "total"}
    perf = {"images_per_s", "data_time", "step_time", "gpu_mem_gb"}
    expected = {f"train/{t}" for t in terms} | {f"perf/{p}" for p in perf}
    expected |= {"alpha/32", "alpha/24", "lr", "step", "epoch", "time"}
    assert set(training[0]) == expected
    for size in ("32", "24", "ensemble"):
        assert {f"val/{m}@{size}" for m in ("top1", "top5", "loss")} <= set(evaluations[0])


def test_a_folder_in_which_a_run_is_trained_is_not_entered(train, photos, tmp_path):
    run = tmp_path / "run"
    with RunDir(run, continues=False, active=True).alone():
        code, _, err = train("--data", photos, *RUN, "--output", run, "--epochs", 1)
    assert code == 2
    assert f"a process that still runs trains in {run}; wait for it, stop it, or" in err
    assert not (run / "config.json").exists()


def test_a_run_is_not_overwritten(train, photos, trained):
    """The same command finds that all is done; one with other options is refused."""
    before = (trained / "metrics.jsonl").read_text()
    last = (trained / "checkpoints" / "last.pt").read_bytes()
    arguments = ["--data", photos, *RUN, "--output", trained, "--wandb", "disabled"]
    line = (
        f"{trained}: already finished after 2 epochs: raise --epochs, with --resume auto, or give "
        "another --output"
    )
    code, out, _ = train(*arguments, "--epochs", 2)
    assert code == 0
    assert line in out.splitlines()
    for options, message in (
        (["--momentum", "0.8"], "with other options (--momentum 0.9 -> 0.8); resume it with"),
        (["--lr", "0.3"], "with other options (--lr 0.003125 -> 0.3); resume it with"),
        (["--resume", "auto", "--lr", "0.3"], f"{line} (--lr 0.003125 -> 0.3)"),
        (["--resume", "auto", "--epochs", "1"], f"{line} (--epochs 2 -> 1)"),
        ([], f"{line} (--epochs 2)"),  # the command asks for 120
    ):
        code, _, err = train(*arguments, *options)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    assert (trained / "metrics.jsonl").read_text() == before
    assert (trained / "checkpoints" / "last.pt").read_bytes() == last


def test_evaluation_needs_only_the_checkpoint(train, photos, trained):
    last = trained / "checkpoints" / "last.pt"
    code, out, _ = train("--data", photos, "--evaluate", "--resume", last, "--workers", 1, "-b", 8)
    assert code == 0
    final = _metrics(trained)[-1]
    for size in ("32", "24", "ensemble"):
        row = next(line for line in out.splitlines() if line.split()[:1] == [size])
        assert float(row.split()[2]) == pytest.approx(final[f"val/top1@{size}"], abs=0.01)
    assert not Path("runs").exists()


def test_one_of_the_sizes_can_be_evaluated_alone(train, photos, trained):
    code, _, _ = train(
        "--data", photos, "--evaluate", "--resume", trained / "checkpoints" / "best.pt",
        "--sizes", 24, "--workers", 1, "--output", "here",
    )  # fmt: skip
    assert code == 0
    assert list(json.loads(Path("here/evaluation.json").read_text()))[1:] == ["24", "ensemble"]
    assert Path("here/evaluation.png").exists()


def test_a_resumed_run_ends_like_one_that_was_not_stopped(train, photos, trained, tmp_path):
    """Stopped after one of two epochs: order, crops, optimizer, alpha and schedule go on."""
    arguments = ["--data", photos, *RUN, "--wandb", "disabled", "--epochs", 2]
    # What the uninterrupted run had after its first epoch is trained again in a run of its own.
    first = tmp_path / "first"

    class StopError(Exception):
        pass

    original = session.TrainingRun._save

    def save_and_stop(self, results):
        original(self, results)
        raise StopError

    session.TrainingRun._save = save_and_stop
    try:
        with pytest.raises(StopError):
            train(*arguments, "--output", first)
    finally:
        session.TrainingRun._save = original
    code, out, _ = train(*arguments, "--output", first, "--resume", "auto")
    assert code == 0
    assert "after epoch 1" in out
    ended, whole = (
        torch.load(r / "checkpoints" / "last.pt", weights_only=True) for r in (first, trained)
    )
    assert ended["step"] == whole["step"] == 4
    for name, value in whole["model"].items():
        torch.testing.assert_close(ended["model"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_epoch_has_its_own_order_also_after_resuming(train, photos, monkeypatch):
    epochs = []
    original = DaliLoader.set_epoch

    def record(self, epoch):
        epochs.append(epoch)
        original(self, epoch)

    monkeypatch.setattr(DaliLoader, "set_epoch", record)
    arguments = ["--data", photos, *RUN, "--wandb", "disabled", "--resume", "auto"]
    assert train(*arguments, "--epochs", 2)[0] == 0
    assert train(*arguments, "--epochs", 3)[0] == 0
    assert epochs == [0, 1, 2]


@pytest.mark.slow
def test_a_continued_run_keeps_its_best_score_and_its_wandb_run(train, photos, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    last, best = (run / "checkpoints" / name for name in ("last.pt", "best.pt"))
    checkpoint.save(last, dataclasses.replace(checkpoint.load(last), wandb_id="abc123"))
    checkpoint.save(best, dataclasses.replace(checkpoint.load(best), best=[201.0, 201.0]))
    code, _, _ = train(
        "--data", photos, *RUN, "--resume", "auto", "--epochs", 3, "--output", run,
        "--wandb", "offline",
    )  # fmt: skip
    assert code == 0
    content = checkpoint.load(last)
    assert content.epoch == 3
    assert content.best == [201, 201]
    assert content.wandb_id == "abc123"
    assert list(run.glob("wandb/offline-run-*-abc123"))


def test_a_run_continued_elsewhere_has_its_own_best(train, photos, trained, tmp_path):
    code, out, _ = train(
        "--data", photos, *RUN, "--resume", trained / "checkpoints" / "last.pt", "--epochs", 3,
        "--output", tmp_path / "fork", "--wandb", "disabled",
    )  # fmt: skip
    assert code == 0
    assert "after epoch 2, with changed --epochs 2 -> 3" in out
    assert (tmp_path / "fork" / "checkpoints" / "best.pt").exists()


@pytest.mark.slow
def test_resume_auto_starts_where_there_is_nothing(train, photos):
    code, out, _ = train(
        "--data", photos, *RUN, "--epochs", 1, "--resume", "auto", "--wandb", "disabled"
    )
    assert code == 0
    assert "resumed" not in out
    # Of this arch and this data; of other data there is no run there.
    run = Path("runs", f"parallel_resnet18-{photos.name}")
    assert (run / "checkpoints" / "last.pt").exists()
    # A run of version 0.1.0 goes on where it is.
    run.rename("runs/parallel_resnet18")
    again = train("--data", photos, *RUN, "--epochs", 1, "--wandb", "disabled")
    assert again[0] == 0
    assert "runs/parallel_resnet18: already finished after 1 epochs" in again[1]


def test_errors_name_only_options_that_were_typed(train, photos, tmp_path):
    words = [*RUN, "--epochs", 1, "--wandb", "disabled"]
    data = tmp_path / "a" / "pets"
    shutil.copytree(photos, data)
    assert train("--data", data, *words)[0] == 0
    code, _, err = train("--data", data, *words, "--momentum", 0.5)
    assert code == 2
    assert "error: runs/parallel_resnet18-pets already holds a run" in err
    other = tmp_path / "b" / "pets"
    shutil.copytree(photos, other)
    image = next((other / "train" / "ant").iterdir())
    image.rename(image.with_name("renamed.JPEG"))
    code, _, err = train("--data", other, *words, "--output", "runs/parallel_resnet18-pets")
    assert code == 2
    assert "--resume" not in err.replace("--resume auto", "")
    assert "runs/parallel_resnet18-pets: " in err


def test_images_of_another_folder_of_the_same_name_are_not_taken_for_the_runs(
    train, photos, tmp_path
):
    words = [*RUN, "--epochs", 1, "--wandb", "disabled"]
    for name in ("a", "b"):
        shutil.copytree(photos, tmp_path / name / "pets")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "pets")
    assert train("--data", tmp_path / "a" / "pets", *words)[0] == 0
    config = Path("runs/parallel_resnet18-pets/config.json").read_bytes()
    code, _, err = train("--data", tmp_path / "b" / "pets", *words)
    assert code == 2
    moved = f"--data {tmp_path}/a/pets -> {tmp_path}/b/pets"
    assert f"runs/parallel_resnet18-pets holds a run on images of another place ({moved}); " in err
    assert Path("runs/parallel_resnet18-pets/config.json").read_bytes() == config
    same = ["--output", "runs/parallel_resnet18-pets"]
    code, out, _ = train("--data", tmp_path / "b" / "pets", *words, *same)
    assert code == 0
    assert f"not as before: {moved}\n" in out
    code, out, _ = train("--data", tmp_path / "link", *words, *same)
    assert code == 0
    assert "not as before" in out  # the run is one on b/pets now
    code, out, _ = train("--data", tmp_path / "a" / "pets", *words, *same)
    assert "not as before" not in out


def test_what_a_command_leaves_to_the_run_that_it_continues_is_said(
    train, photos, trained, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    last = run / "checkpoints" / "last.pt"
    before = dataclasses.replace(checkpoint.load(last), epoch=1)
    checkpoint.save(last, before)
    words = ["--data", photos, "-a", "parallel_resnet18", "-b", 8, "--workers", 1]
    code, out, _ = train(*words, "--output", run, "--wandb", "disabled")
    assert code == 0
    assert (
        f"from the run in {run}: --sizes 32 24, --width-mult 0.125, --epochs 2" in out.splitlines()
    )


def test_another_run_is_not_continued_in_an_occupied_folder(train, photos, trained, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text("{}\n")
    code, _, err = train(
        "--data", photos, *RUN, "--resume", trained / "checkpoints" / "last.pt",
        "--output", tmp_path / "other", "--wandb", "disabled",
    )  # fmt: skip
    assert code == 2
    assert "holds a run already" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "parallel_resnet19"], "did you mean parallel_resnet18"),
        (["--sizes"], "--sizes: give one or more sizes"),
        (["--sizes", "0", "32"], "--sizes 0 32"),
        (["--sizes", "32", "32"], "--sizes 32 32"),
        (["--sizes", "8"], "8 is too small for parallel_resnet18"),
        (["--epochs", "0"], "--epochs 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--num-classes", "2"], "--num-classes 2: the data has 3 classes"),
        (["--batch-size", "1"], "--batch-size 1: BatchNorm needs"),
        (["--batch-size", "24"], "--batch-size: one step takes 24 images"),
        (["--accumulate", "3"], "--accumulate 3: an epoch has only 2 batches"),
        (["--resume", "nowhere.pt"], "--resume: there is no run, checkpoint or release nowhere.pt"),
        (["--evaluate", "--resume", "auto"], "--resume auto: there is no checkpoint"),
        (["--output", "/proc/no/run"], "--output: cannot write to /proc/no/run"),
        (["--device", "cuda"], "--device cuda: process 0 has no GPU"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(train, photos, options, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = train("--data", photos, *RUN, "--wandb", "disabled", *options)
    assert code == 2
    assert message in err
    assert err.startswith("train_dali.py: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "40", "24"], "--sizes is 32 24 there and 40 24 here"),
        (
            ["--arch", "parallel_resnet34"],
            "--arch is parallel_resnet18 there and parallel_resnet34 here",
        ),
        (["--num-classes", "5"], "--num-classes is 3 there and 5 here"),
    ],
)
def test_a_checkpoint_of_another_network_names_what_differs(
    train, photos, trained, options, message
):
    last = trained / "checkpoints" / "last.pt"
    code, _, err = train("--data", photos, *RUN, "--resume", last, "--output", "new", *options)
    assert code == 2
    assert message in err


def test_a_checkpoint_of_other_classes_names_one(train, trained, tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / "data" / split, {"ant": 4, "bee": 4, "dog": 4})
    last = trained / "checkpoints" / "last.pt"
    code, _, err = train("--data", tmp_path / "data", *RUN, "--resume", last, "--output", "new")
    assert code == 2
    assert "class 2 is cat there and dog here" in err


def test_a_broken_image_ends_the_run_with_its_path(train, tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / "data" / split, {"ant": 8, "bee": 8})
    bad = tmp_path / "data" / "train" / "bee" / "003.JPEG"
    bad.write_bytes(bad.read_bytes()[:500])
    code, _, err = train("--data", tmp_path / "data", *RUN, "--wandb", "disabled")
    assert code == 1
    assert f"broken image {bad}: " in err
    assert err.count("\n") == 1


def test_ctrl_c_ends_a_run_in_one_line_and_it_can_go_on(photos, tmp_path):
    command = [
        sys.executable, ROOT / "train_dali.py", "--data", photos, *RUN, "--output", tmp_path / "run",
        "--epochs", "500", "--wandb", "offline",
    ]  # fmt: skip
    environ = {"WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}
    with processes.start(command, environ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 2/500"):
                process.send_signal(signal.SIGINT)
                break
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(
        r"train_dali.py: stopped by SIGINT: saved after update \d/2 of epoch \d+; "
        r"rerun the same command to resume",
        err.strip(),
    )
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def test_a_folder_that_is_read_only_is_refused(train, photos, tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "readonly").write_text("root may write to any folder, but not below a file")
    else:
        (tmp_path / "readonly").mkdir(mode=0o500)
    code, _, err = train("--data", photos, *RUN, "--output", tmp_path / "readonly" / "run")
    assert code == 2
    assert f"--output: cannot write to {tmp_path}/readonly/run" in err

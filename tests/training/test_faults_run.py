"""Faults of one process: signals in odd places, full disks, losses that are not finite, broken loaders."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from pipelines.dali import DaliOptions, make_loaders
from pipelines.dali.loader import DaliLoader
from rsnet.checkpoint import io as checkpoint
from rsnet.train import main
from rsnet.training import run as session
from rsnet.training import trainer as engine
from rsnet.training.trainer import Trainer
from tests.helpers import faults
from tests.helpers.faults import (
    RUN,
    UPDATES,
    assert_same_end,
    command,
    end,
    finish,
    metrics,
    reached,
    saved,
    start,
    wait_for,
)

pytestmark = pytest.mark.faults
SLOW = pytest.mark.slow  # several processes of nine seconds each


@pytest.fixture
def train(monkeypatch, capsys, photos, tmp_path):
    """Train in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # as in `tests.helpers.faults.start`: other numbers add up in another order

    def call(run: Path, *arguments: str | Path | int) -> tuple[int, str, str]:
        words = ["train_dali.py", "--data", photos, "--output", run, *RUN, *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        code = main("train_dali.py", DaliOptions, make_loaders)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(n, marks=SLOW)
        for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    ],
)
def test_a_signal_in_an_evaluation_stops_it_and_the_run_goes_on_exactly(
    train, whole, tmp_path, monkeypatch, number
):
    run = tmp_path / "run"
    evaluations = 0
    real = session.evaluate

    def interrupted(model, loader, device, amp, on_batch):
        nonlocal evaluations
        evaluations += 1
        batches = 0

        def on_this_batch():
            nonlocal batches
            batches += 1
            if evaluations == 2 and batches == 2:
                os.kill(os.getpid(), number)
            on_batch()

        return real(model, loader, device, amp, on_this_batch)

    monkeypatch.setattr(session, "evaluate", interrupted)
    code, _, err = train(run)
    assert code == 128 + number
    assert err == (
        f"train_dali.py: stopped by {number.name}: saved after update 5/5 of epoch 2; "
        "rerun the same command to resume\n"
    )
    assert saved(run)["epoch"] == 1
    finish(command(tmp_path.parent / "unused", run, "--data", saved(run)["config"]["data"]))
    assert_same_end(run, whole)


@SLOW
def test_a_run_goes_on_to_the_same_end_without_a_console(photos, whole, tmp_path):
    run = tmp_path / "run"
    process = start(command(photos, run))
    wait_for(reached(run, 2), process)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(faults.LIMIT_S) == 0
    assert "stdout is lost (Broken pipe)" in (run / "log.txt").read_text()
    assert_same_end(run, whole)


@SLOW
def test_a_second_signal_ends_at_once_and_leaves_a_whole_checkpoint(photos, whole, tmp_path):
    run = tmp_path / "run"
    process = start(command(photos, run))
    wait_for(reached(run, 6), process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    end(process, None)
    assert process.returncode in (143, -15)
    checkpoint.load(run / "checkpoints" / "last.pt")
    finish(command(photos, run))
    assert_same_end(run, whole)


# `LIMIT COMMAND`: run a script that cannot write files of more than LIMIT bytes.
LIMITED = """
import resource, runpy, sys
_, limit, *sys.argv = sys.argv
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("reaction", ["stop", pytest.param("continue", marks=SLOW)])
def test_a_full_disk_leaves_the_checkpoint_before_it(photos, whole, tmp_path, reaction):
    """A limit on the size of files, of half a checkpoint, stands for the disk."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = (run / "checkpoints" / "last.pt").read_bytes()
    limit = len(before) // 2
    words = command(photos, run, "--resume", "auto", "--epochs", "5", "--on-save-error", reaction)
    out, err = finish([words[0], "-c", LIMITED, str(limit), *words[1:]], int(reaction == "stop"))
    assert (run / "checkpoints" / "last.pt").read_bytes() == before
    assert checkpoint.load(run / "checkpoints" / "last.pt").step == UPDATES
    assert not list((run / "checkpoints").glob("*.tmp"))
    if reaction == "stop":
        assert err.count("\n") == 1
        assert "cannot save to" in err
        assert "File too large; the checkpoint before it is whole" in err
    else:
        assert "File too large; the checkpoint before it stays, the training goes on" in out
        assert metrics(run)[-1]["epoch"] == 5


def _poison(monkeypatch, steps: set[int], value: float = torch.nan) -> None:
    """Pictures that are not finite in these updates."""
    real = Trainer.forward_backward

    def forward_backward(self, batch, last):
        if self.step in steps:
            images = tuple(torch.full_like(x, value) for x in batch.images)
            batch = batch._replace(images=images)
        return real(self, batch, last)

    monkeypatch.setattr(engine.Trainer, "forward_backward", forward_backward)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_does_harm(train, tmp_path, monkeypatch):
    _poison(monkeypatch, {3})
    code, _, err = train(tmp_path / "run", "--checkpoint-every", 1)
    assert code == 1
    assert "the loss is not finite at step 3: ce/32" in err
    assert err.count("\n") == 1
    content = saved(tmp_path / "run")
    assert content["step"] == 3
    assert all(v.isfinite().all() for v in content["model"].values() if v.is_floating_point())


@pytest.mark.slow
def test_some_updates_may_be_left_out_and_are_counted(train, tmp_path, monkeypatch):
    run = tmp_path / "run"
    _poison(monkeypatch, {3, 4, 9})
    code, _, _ = train(run, "--on-nonfinite", "skip", 2)
    assert code == 0
    assert metrics(run)[-2]["skipped_updates"] == 3
    content = saved(run)
    for state in (content["model"], content["ema"]):  # and BatchNorm's statistics, which saw it
        assert all(v.isfinite().all() for v in state.values() if v.is_floating_point())
    _poison(monkeypatch, {3, 4, 5})
    code, _, err = train(tmp_path / "other", "--on-nonfinite", "skip", 2)
    assert code == 1
    assert "the loss is not finite at step 5" in err


@SLOW
def test_a_loader_that_raises_ends_the_run_and_it_can_go_on(train, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = DaliLoader._read

    def broken(self, epoch, first_step):
        for i, batch in enumerate(real(self, epoch, first_step)):
            if epoch == 1 and i == 3:
                raise RuntimeError("the disk is gone")
            yield batch

    monkeypatch.setattr(DaliLoader, "_read", broken)
    with pytest.raises(
        RuntimeError, match="the disk is gone"
    ):  # a fault of the program: not hidden
        train(run, "--checkpoint-every", 1)
    log = (run / "log.txt").read_text()
    assert "Traceback" in log
    assert "RuntimeError: the disk is gone" in log
    monkeypatch.undo()
    assert saved(run)["step"] == 8
    finish(command(Path(saved(run)["config"]["data"]), run))
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 ..."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),  # libraries' own have no type
    ],
)
def test_too_little_gpu_memory_is_one_line_with_what_to_lower(train, tmp_path, monkeypatch, error):
    def forward_backward(*_):
        raise error

    monkeypatch.setattr(engine.Trainer, "forward_backward", forward_backward)
    code, _, err = train(tmp_path / "run")
    assert code == 1
    assert "out of GPU memory" in err
    assert (
        "--batch-size 4 at sizes 32 24 16, amp off. Halve --batch-size and double --accumulate"
        in err
    )
    assert err.count("\n") == 1


@pytest.mark.parametrize("where", ["model", "ema"])
def test_weights_that_are_not_finite_are_not_evaluated(train, whole, tmp_path, where):
    content = saved(whole)
    name = next(n for n, v in content[where].items() if v.is_floating_point())
    content["model"][name].view(-1)[0] = torch.nan
    if where == "model":
        content["ema"] = None
    else:
        content["ema"][name].view(-1)[0] = torch.nan
    torch.save(content, tmp_path / "x.pt")
    code, out, err = train(tmp_path / "run", "--evaluate", "--resume", tmp_path / "x.pt")
    assert code == 1
    assert f"x.pt does not fit: {name} has numbers that are not finite" in err
    assert "ensemble" not in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", 5], "seed 0 -> 5: the run would not go on with the images"),
        (["-b", 8], "global batch 4 -> 8: the run would not"),
        (["--accumulate", 2, "-b", 4], "global batch 4 -> 8: the run would not"),
        (
            ["--arch", "parallel_resnet18"],
            "--arch is parallel_resnet10 there and parallel_resnet18 here",
        ),
        (["--sizes", 32, 24], "--sizes is 32 24 16 there and 32 24 here"),
        (["--num-classes", 5], "--num-classes is 3 there and 5 here"),
    ],
)
def test_what_would_change_the_run_is_refused(train, whole, change, message):
    before = (whole / "checkpoints" / "last.pt").read_bytes()
    code, _, err = train(whole, "--resume", "auto", "--epochs", 6, *change)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert (whole / "checkpoints" / "last.pt").read_bytes() == before


def test_other_data_is_refused_by_the_names_of_its_files(train, photos, whole, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    image = next((data / "train" / "ant").iterdir())
    image.rename(image.with_name("renamed" + image.suffix))
    code, _, err = train(whole, "--resume", "auto", "--epochs", 6, "--data", data)
    assert code == 2
    assert "--resume: as many images as before, but others" in err
    assert "add --allow-change data" in err


@SLOW
def test_an_allowed_change_is_said(train, photos, tmp_path, monkeypatch):
    run = tmp_path / "run"
    _poison(monkeypatch, {7})
    assert train(run, "--checkpoint-every", 1)[0] == 1
    monkeypatch.undo()
    shutil.copytree(run, tmp_path / "seed")
    seed = command(photos, tmp_path / "seed", "--resume", "auto", "--seed", "5")
    out, _ = finish([*seed, "--allow-change", "seed"])
    assert "not as before: seed 0 -> 5" in out
    assert "not as before: epoch 2 begins anew, in another order" in out
    batch = command(photos, run, "--resume", "auto", "-b", "8", "--allow-change", "global-batch")
    out, _ = finish(batch)
    assert (
        "after update 1/2 of epoch 2" in out
    )  # 8 images were seen, of which one update is made now
    assert "not as before: global batch 4 -> 8" in out
    assert metrics(run)[-1]["epoch"] == 4

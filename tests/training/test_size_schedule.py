"""Trainings whose sizes change over the epochs: what each step trains, resume, BatchNorm, evaluations."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from pipelines import synthetic
from rsnet.checkpoint.io import load
from rsnet.config.command_line import parse
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import resolve
from rsnet.models.factory import create_model
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.size_schedule import follow_nearest, used_images
from rsnet.training.trainer import Trainer
from tests.helpers import synthetic_run
from tests.helpers.faults import differences
from tests.training.test_trainer import _tiny

UPDATES = 2  # an epoch
RUN = [
    "--sizes", "24", "16", "8", "--size-schedule", "0:8", "1:16,8", "3:all", "--epochs", "4",
    "--train-images", "8", "--ema", "0.5", "--mixup", "0.2", "--log-interval", "1",
]  # fmt: skip


def _expected(epoch: int) -> tuple[int, ...]:
    """The schedule of RUN written out."""
    if epoch < 1:
        return (8,)
    return (16, 8) if epoch < 3 else (24, 16, 8)


EVERY = [(step, _expected(step // UPDATES)) for step in range(4 * UPDATES)]


class _Watched:
    """Trains by `synthetic_run`, and notes (step, sizes whose forward was run) of each batch in training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[int, tuple[int, ...]]] = []
        self.stops: set[int] = set()  # steps that a signal comes in
        self.printed = io.StringIO()
        sizes: list[int] = []
        forward, train = ResolutionSwitchable.forward, Trainer.forward_backward

        def spy_size(model, x, size=None):
            if model.training:
                sizes.append(size)
            return forward(model, x, size)

        def spy_step(trainer, batch, last):
            terms = train(trainer, batch, last)
            self.steps.append((trainer.step, tuple(sizes)))
            sizes.clear()
            if trainer.step in self.stops:
                self.stops.remove(trainer.step)
                os.kill(os.getpid(), signal.SIGTERM)
            return terms

        monkeypatch.setattr(ResolutionSwitchable, "forward", spy_size)
        monkeypatch.setattr(Trainer, "forward_backward", spy_step)

    def train(self, run: Path, *more: str, code: int = 0) -> None:
        with contextlib.redirect_stdout(self.printed):
            synthetic_run.train(run, *RUN, *more, code=code)


@pytest.fixture
def watched(monkeypatch) -> _Watched:
    return _Watched(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, _Watched]:
    """A run that nothing happens to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        watched = _Watched(patch)
        watched.train(run, "--keep", "9")
    return run, watched


def test_each_step_runs_the_sizes_of_its_epoch(whole):
    run, watched = whole
    assert watched.steps == EVERY
    out = watched.printed.getvalue()
    assert "steps         train 8 up to epoch 1, 16 8 up to epoch 3, then 24 16 8; 4" in out
    assert "epoch 2/4: steps train 16 8" in out
    assert "epoch 4/4: steps train 24 16 8" in out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/total" in line]
    assert [tuple(s for s in (24, 16, 8) if f"train/ce/{s}" in line) for line in trained] == [
        sizes for _, sizes in EVERY
    ]


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_with_the_sizes_of_its_epoch_to_the_same_bits(
    whole, watched, tmp_path
):
    """Stopped within the first part, at its end, and in an epoch in the middle of the second."""
    parts = tmp_path / "parts"
    watched.stops |= {0, 1, 4}
    for code in (143, 143, 143, 0):
        watched.train(parts, code=code)
    assert watched.steps == EVERY
    one, other = (load(run / "checkpoints" / "last.pt") for run in (whole[0], parts))
    for name in ("model", "ema", "optimizer"):
        assert differences(getattr(one, name), getattr(other, name)) == []


def test_a_size_that_waits_is_evaluated_with_the_next_ones_batchnorm_and_starts_from_it(whole):
    saved = map(load, (whole[0] / "checkpoints").glob("last*.pt"))
    by_epoch = {c.epoch: c for c in saved}
    counters = "network.bn1.by_resolution.{}.num_batches_tracked"
    mean = "network.bn1.by_resolution.{}.running_mean"
    for state in (by_epoch[1].model, by_epoch[1].ema):
        assert [int(state[counters.format(i)]) for i in range(3)] == [0, 0, 2]
        assert torch.equal(state[mean.format(0)], state[mean.format(2)])
        assert torch.equal(state[mean.format(1)], state[mean.format(2)])
        assert state[mean.format(2)].any()
    for state in (by_epoch[2].model, by_epoch[2].ema):
        assert [int(state[counters.format(i)]) for i in range(3)] == [0, 2, 4]
        assert torch.equal(state[mean.format(0)], state[mean.format(1)])
        assert not torch.equal(state[mean.format(1)], state[mean.format(2)])
    assert [int(by_epoch[4].model[counters.format(i)]) for i in range(3)] == [2, 6, 8]


def test_batchnorm_that_was_trained_before_the_schedule_is_left_alone():
    model = ResolutionSwitchable(_tiny(), (40, 32, 24))
    for norm in model.norms_of([40, 24]):
        norm.num_batches_tracked += 1
        norm.running_mean.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    follow_nearest(model, but=[32])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    follow_nearest(model)
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"network.{layer}.by_resolution.1.running_mean" for layer in (1, 4)}
    for layer in (1, 4):  # 32 is as far from both: the larger
        norms = model.network[layer].by_resolution
        assert torch.equal(norms[1].running_mean, norms[0].running_mean)


@pytest.mark.slow
def test_saving_within_an_epoch_changes_nothing_of_sizes_still_to_be_drawn(tmp_path):
    """With this seed 12 is drawn in the second epoch's second update, for the first time."""
    words = ["--sizes", "16", "12", "8", "--size-schedule", "0:8", "1:all", "--sizes-per-step", "2"]
    words += ["--epochs", "2", "--train-images", "12", "--ema", "0.5", "--seed", "1"]
    for every in ("0", "1"):
        synthetic_run.train(tmp_path / every, *words, "--checkpoint-every", every)
    one, other = (load(tmp_path / every / "checkpoints" / "last.pt") for every in ("0", "1"))
    for name in ("model", "ema", "optimizer"):
        assert differences(getattr(one, name), getattr(other, name)) == []


@pytest.mark.slow
def test_what_an_ordinary_networks_file_has_counted_is_not_taken_for_this_trainings(tmp_path):
    """Else a size that waits would keep the file's BatchNorm, while the shared weights change."""
    network = create_model(
        ModelConfig("parallel_resnet10", 3, (16,), width_mult=0.125, stem="small")
    ).network
    state = {k.replace(".by_resolution.0.", "."): v for k, v in network.state_dict().items()}
    torch.save(
        {k: v + 7 if "num_batches" in k else v for k, v in state.items()}, tmp_path / "a.pth"
    )
    words = ["--pretrained", str(tmp_path / "a.pth"), "--size-schedule", "0:8", "1:all"]
    synthetic_run.train(tmp_path / "run", *words, "--epochs", "2", "--keep", "2")
    first = next(
        c for c in map(load, (tmp_path / "run" / "checkpoints").glob("last*.pt")) if c.epoch == 1
    )
    norms = [first.model[f"network.bn1.by_resolution.{place}.running_mean"] for place in (0, 1)]
    assert torch.equal(*norms)
    assert not torch.equal(norms[0], state["bn1.running_mean"])


def test_the_loader_makes_what_steps_and_teacher_use():
    def used(*more: str, teachers: tuple[int, ...] = ()):
        words = ["--data", ".", "--sizes", "32", "24", "16", "--size-schedule", "0:16", "2:all"]
        config, _ = parse(synthetic.SyntheticOptions, [*words, *more])
        resolved = resolve(config, world_size=1, device_type="cpu", has_bf16=False)
        return used_images(resolved, teachers)

    assert used() == ((0, (2,)), (2, (0, 1, 2)))
    assert used(teachers=(32, 48)) == ((0, (0, 2)), (2, (0, 1, 2)))
    # By the pixels of training: a teacher that looks at 20 has the picture of size 24.
    assert used("--train-size-scale", "0.875", teachers=(20,))[0] == (0, (1, 2))
    assert used("--profile") == used("--size-schedule", "0:all") == ()


@pytest.mark.slow
def test_sizes_that_an_rs_net_to_start_from_has_keep_its_batchnorm_until_they_are_trained(tmp_path):
    words = ["--sizes", "24", "16", "--epochs", "1", "--train-images", "8"]
    synthetic_run.train(tmp_path / "first", *words)
    before = load(tmp_path / "first" / "checkpoints" / "last.pt").model
    words = ["--sizes", "24", "16", "8", "--pretrained", str(tmp_path / "first"), "--keep", "2"]
    words += ["--size-schedule", "0:24", "1:all", "--epochs", "2", "--train-images", "8"]
    synthetic_run.train(tmp_path / "run", *words)
    first = next(
        c for c in map(load, (tmp_path / "run" / "checkpoints").glob("last*.pt")) if c.epoch == 1
    )
    means = [first.model[f"network.bn1.by_resolution.{place}.running_mean"] for place in range(3)]
    assert torch.equal(means[1], before["network.bn1.by_resolution.1.running_mean"])
    assert not torch.equal(means[1], means[0])
    assert torch.equal(means[2], means[1])  # 8 is new, and 16 the nearest


@pytest.mark.slow
def test_a_profile_measures_steps_of_all_sizes(watched, tmp_path):
    watched.train(tmp_path / "run", "--profile", "--profile-steps", "1")
    assert {sizes for _, sizes in watched.steps} == {(24, 16, 8)}
    assert "--size-schedule: measured are the last part's steps" in watched.printed.getvalue()

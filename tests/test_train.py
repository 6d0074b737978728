"""What a training begins with: each rank's random numbers, and notes on its schedule."""

from __future__ import annotations

import subprocess
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from pipelines.sources.options import SplitOptions
from pipelines.synthetic import SyntheticOptions, make_loaders
from pipelines.utils.errors import RunError, UsageError
from rsnet import train
from rsnet.config.command_line import parse
from rsnet.config.resolve import resolve
from rsnet.config.train_config import TrainConfig
from rsnet.distributed import process_group
from rsnet.training.signals import TrainingInterrupted

GPU = torch.device("cuda", 0)

LINE = [
    "--data", "none", "--arch", "parallel_resnet10", "--width-mult", "0.125", "--stem", "small",
    "--sizes", "16", "-b", "4", "--amp", "off", "--device", "cpu", "--wandb", "disabled",
    "--train-images", "8", "--val-images", "4", "--classes", "3",
]  # fmt: skip


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Do all but train; returns the first weight, and what a layer draws next."""
    monkeypatch.chdir(tmp_path)
    found = []

    def instead(context, _start):
        weight = next(context.model.network.parameters()).detach().clone()
        found.append((weight, torch.rand(4)))
        return {}

    monkeypatch.setattr(train, "train", instead)

    def call(*words: str, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(process_group, "rank", lambda: rank)
            patch.setattr(process_group, "world_size", lambda: 2)
            assert train.main("rsnet train", SyntheticOptions, make_loaders, [*LINE, *words]) == 0
        return found[-1]

    return call


def test_ranks_have_the_same_network_and_other_random_numbers(begin):
    (first, drawn), (second, others), (again, same) = (begin(rank=r) for r in (0, 1, 0))
    assert torch.equal(first, second)
    assert torch.equal(drawn, same)
    assert torch.equal(first, again)
    assert not torch.equal(drawn, others)


def test_a_run_among_the_images_that_it_is_trained_on_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("d/train").mkdir(parents=True)

    def opened(*_):
        raise UsageError("the images are opened")

    for output, more, line in (
        ("d/train/run", [], "--output: d/train/run lies among the images of d/train; "),
        (
            "d/train/run",
            ["--val-fraction", "0.5"],
            "--output: d/train/run lies among the images of",
        ),
        ("d/run", [], "the images are opened"),
    ):
        data = "d/train" if more else "d"
        words = ["--data", data, "--arch", "resnet18", "--output", output, "--device", "cpu", *more]
        assert train.main("rsnet train", SyntheticOptions, opened, words) == 2
        assert line in capsys.readouterr().err


def test_a_stop_is_one_even_if_another_process_was_killed_meanwhile(monkeypatch, capsys):
    def lost(_):
        raise RuntimeError("Connection closed by peer")

    def stopped(*_):
        raise TrainingInterrupted(15, "update 3")

    monkeypatch.setattr(process_group, "all_gather_object", lost)
    monkeypatch.setattr(train, "run", stopped)
    assert train.main("rsnet train", SyntheticOptions, make_loaders, LINE) == 143
    assert "rsnet train: stopped by SIGTERM: saved after update 3" in capsys.readouterr().err


def test_an_evaluation_does_not_write_over_one_in_more_detail(tmp_path):
    (tmp_path / "per_class.csv").touch()
    with pytest.raises(
        UsageError, match=f"--output: {tmp_path} holds an evaluation of other files"
    ):
        train._make_folder(tmp_path)


def test_neighbouring_seeds_and_ranks_have_different_random_numbers():
    seeds = {train.rank_seed(seed, rank) for seed in range(8) for rank in range(8)}
    assert len(seeds) == 64
    torch.manual_seed(max(seeds))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (UsageError("--lr"), 2),
        (RunError("out of GPU memory"), 1),
        (KeyError("a bug"), 1),
        (TrainingInterrupted(15, "update 3"), 0),  # all stop together
    ],
)
def test_the_process_group_is_told_of_an_error_that_others_may_not_have_met(
    error, code, tmp_path, monkeypatch
):
    told = []

    def run(*_):
        if error is not None:
            raise error

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(process_group, "shutdown", told.append)
    with pytest.raises(KeyError) if isinstance(error, KeyError) else nullcontext():
        train.main("train", SyntheticOptions, make_loaders, ["--data", str(tmp_path)])
    assert told == [code]


def _fail_to_build(monkeypatch, tmp_path, compiler):
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", compiler) if compiler else monkeypatch.delenv("CC", raising=False)
    build.compile_module_from_src("", "nothing")


def _do_nondeterministically(*_):
    raise RuntimeError(
        "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
    )


@pytest.mark.parametrize(
    ("fail", "line"),
    [
        (
            _do_nondeterministically,
            "--deterministic: adaptive_avg_pool2d_backward_cuda is not",
        ),
        (
            partial(_fail_to_build, compiler=""),
            r"--fused-bn: Triton .* \(Failed to find C compiler",
        ),
        (partial(_fail_to_build, compiler="/bin/false"), "--fused-bn: Triton .*exit status 1"),
    ],
)
def test_what_a_device_or_its_compiler_cannot_do_is_one_line(fail, line, monkeypatch, tmp_path):
    config = resolve(
        TrainConfig(data=tmp_path, fused_bn=True), world_size=1, device_type="cuda", has_bf16=True
    )
    with pytest.raises(RunError, match=line), train._device_errors_in_one_line(config, GPU):
        fail(monkeypatch, tmp_path)


def test_an_error_of_another_command_stays_what_it_is(tmp_path):
    config = resolve(TrainConfig(data=tmp_path), world_size=1, device_type="cpu", has_bf16=True)
    with (
        pytest.raises(subprocess.CalledProcessError),
        train._device_errors_in_one_line(config, torch.device("cpu")),
    ):
        subprocess.run(["/bin/false"], check=True)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--flip shared", "flip", "shared"),
        ("--seed 5", "seed", 5),
        ("--random-erase 0.3", "random_erase", 0.3),
        ("--auto-augment rand --ra-magnitude 7", "ra_magnitude", 7),
        ("--auto-augment rand", "auto_augment", "rand"),
        ("--ra-reps 3", "repeats", 3),
        ("--balanced-sampling", "balanced_sampling", True),
        ("--class-weights balanced", "class_weights", "balanced"),
        ("--normalize unit", "normalize", "unit"),
        ("--train-size-scale 0.5", "train_sizes", (16, 12)),
        ("--val-fraction 0.1", "splits", SplitOptions(val_fraction=0.1)),
    ],
)
def test_options_of_the_images_reach_the_loaders(words, name, value):
    line = f"--data d --arch resnet18 --sizes 32 24 {words}"
    config, _ = parse(SyntheticOptions, line.split())
    resolved = resolve(config, world_size=1, device_type="cpu", has_bf16=False)
    assert getattr(train._spec(resolved, torch.device("cpu"), None), name) == value


def test_an_evaluation_whose_loss_is_infinite_is_no_result(monkeypatch):
    found = {"32": {"top1": 0.0, "top5": 0.0, "loss": float("inf")}}
    monkeypatch.setattr(train, "evaluate_with_progress", lambda *_: found)
    monkeypatch.setattr(train, "say_header", lambda _: None)
    with pytest.raises(RunError, match="the loss at size 32 is not finite"):
        train.evaluate(mock.MagicMock(), writes=False)

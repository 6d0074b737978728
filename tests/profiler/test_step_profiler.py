"""The profiler: its parts make up the whole, and it names what is slow."""

from __future__ import annotations

import gzip
import json
import sys

import pytest
import torch

from pipelines.batch import LoaderSpec
from pipelines.dali import DaliOptions, make_loaders
from pipelines.synthetic import SyntheticOptions
from pipelines.synthetic import make_loaders as make_synthetic
from rsnet.config.command_line import parse
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import resolve
from rsnet.loggers import wandb_service
from rsnet.models.factory import create_model
from rsnet.models.shapes import gmacs
from rsnet.models.teacher import Teacher
from rsnet.profiler import report as profile_report
from rsnet.profiler.step_profiler import (
    WARMUP_STEPS,
    Profile,
    Times,
    measure_peak_tflops,
    profile,
    time_steps,
)
from rsnet.train import main
from rsnet.training.trainer import make_trainer
from tests.helpers.clock import Clock, SlowLoader

CPU = torch.device("cpu")
SIZES = (32, 24)


def _setup(clock: Clock, loader_pause: float, network_pause: float, more: str = ""):
    line = "--data d --arch parallel_resnet10 --width-mult 0.125 --stem small --sizes 32 24 -b 4 "
    config, _ = parse(DaliOptions, (line + more).split())
    config = resolve(config, world_size=1, device_type="cpu", has_bf16=False)
    model = create_model(ModelConfig("parallel_resnet10", 3, SIZES, width_mult=0.125, stem="small"))
    loader = make_synthetic(
        SyntheticOptions(train_images=64, classes=3), LoaderSpec("d", SIZES, 4, CPU)
    ).train
    model.register_forward_pre_hook(lambda *_: clock.pause(network_pause))
    trainer = make_trainer(config, model, 3, 16, CPU)
    return config, trainer, model, SlowLoader(loader, clock, loader_pause)


def test_the_parts_of_a_step_are_the_whole(clock):
    _, trainer, model, loader = _setup(clock, 0.03, 0.05)
    real = trainer.update
    trainer.update = lambda: (real(), clock.pause(0.02))
    times = time_steps(trainer, model, iter(loader), 5)
    wall = 1000 * clock.now / (WARMUP_STEPS + 5)
    assert list(times.parts) == [
        "data",
        "forward 32",
        "forward 24",
        "losses",
        "backward",
        "optimizer",
    ]
    assert sum(times.parts.values()) == pytest.approx(times.mean, rel=1e-6)
    assert times.mean == pytest.approx(wall, rel=0.1)
    expected = {"data": 30, "forward 32": 50, "forward 24": 50, "optimizer": 20}
    for part, ms in times.parts.items():
        assert ms == pytest.approx(expected.get(part, 0), abs=0.1)


def test_a_teacher_is_a_part_of_its_own_with_its_operations_and_memory(clock):
    config, trainer, model, loader = _setup(clock, 0.01, 0.05)
    alone = profile(trainer, model, loader, 1.0, 2)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    trainer.teacher = Teacher(network, (32,), SIZES)
    trainer.teacher.register_forward_pre_hook(lambda *_: clock.pause(0.04))
    found = profile(trainer, model, loader, 1.0, 2)
    parts = list(found.compute.parts)
    assert parts == [
        "data",
        "teacher",
        "forward 32",
        "forward 24",
        "losses",
        "backward",
        "optimizer",
    ]
    assert found.compute.parts["teacher"] == pytest.approx(40, abs=0.1)
    # Two of six parts of a trained network's operations; MACs are counted.
    macs = 3 * 32 * 32 * 3
    ratio = found.tflops * found.compute.mean / (alone.tflops * alone.compute.mean)
    assert ratio == pytest.approx(1 + macs / 3e9, rel=1e-9)
    assert found.teacher_mb == pytest.approx(4 * (macs + 3) / 2**20)
    assert "the teacher's weights 0 MB" in profile_report.table(found)
    assert config.teacher == "none"


@pytest.mark.parametrize(
    ("loader_pause", "network_pause", "name", "flag"),
    [(0.3, 0.01, "loader", "--workers up to 8"), (0.01, 0.2, "network", "--amp bf16")],
)
def test_what_is_slow_is_named(clock, monkeypatch, loader_pause, network_pause, name, flag):
    monkeypatch.setattr(profile_report.os, "sched_getaffinity", lambda _: range(8))
    config, trainer, model, loader = _setup(clock, loader_pause, network_pause)
    found = profile(trainer, model, loader, sum(gmacs(model, s) for s in SIZES), 3)
    assert found.bottleneck == name
    line = profile_report.advice(found, config, DaliOptions(workers=1))
    assert line.startswith(f"bottleneck: the {name} (")
    assert flag in line
    assert (found.idle > 0.5) == (name == "loader")
    whole = found.loader.mean + found.compute.mean  # this loader prepares nothing ahead
    assert found.end_to_end.mean == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize(
    ("memory", "together", "found", "missing"),
    [
        (None, [65.0], [], ["--compile", "--prefetch", "cores"]),
        (None, [90.0], ["50 % longer than the slower one alone: they share the cores"], []),
        (
            9.0,
            [90.0],
            ["--compile", "50 % longer than the slower one alone: a larger --prefetch"],
            [],
        ),
    ],
)
def test_what_both_lose_together_is_named(memory, together, found, missing):
    """memory: of a GPU, if there is one."""
    config, _ = parse(DaliOptions, ["--data", "d"])
    config = resolve(config, world_size=1, device_type="cpu", has_bf16=True)
    p = Profile(4, Times([50.0]), Times([60.0]), Times(together), memory, 1.0, 2.0)
    lines = profile_report.advice(p, config, DaliOptions())
    assert lines.startswith("bottleneck: the network (50.0 against 60.0 ms)")
    assert all(text in lines for text in found)
    assert not any(text in lines for text in missing)


def test_the_peak_is_of_the_precision_that_a_gpus_convolutions_have(monkeypatch):
    """Of float32 they are TF32 by default, of eight times the rate, and products are not."""
    matmul, seen = torch.backends.cuda.matmul, []
    before = matmul.fp32_precision
    monkeypatch.setattr(
        "rsnet.profiler.step_profiler.synchronize", lambda _: seen.append(matmul.fp32_precision)
    )
    assert measure_peak_tflops(torch.device("cpu"), None) > 0
    assert set(seen) == {torch.backends.cudnn.conv.fp32_precision} == {"tf32"}
    assert matmul.fp32_precision == before != "tf32"


def test_a_step_is_not_interrupted_to_read_the_clock(clock, monkeypatch):
    """A device that gets its next step only when the last is done would wait for the host each time."""
    _, trainer, model, loader = _setup(clock, 0.01, 0.01)
    waits = []
    monkeypatch.setattr(
        "rsnet.profiler.step_profiler.synchronize", lambda _device: waits.append(trainer.step)
    )
    time_steps(trainer, model, iter(loader), 4)
    assert waits == [WARMUP_STEPS + 4]


def test_sizes_that_not_every_step_has_are_averaged_over_all(clock):
    _, trainer, model, loader = _setup(clock, 0.01, 0.05)
    trainer.sizes_at = lambda step: (32, 24) if step % 2 else (32,)
    times = time_steps(trainer, model, iter(loader), 4)
    assert times.parts["forward 32"] == pytest.approx(50, abs=0.1)
    assert times.parts["forward 24"] == pytest.approx(25, abs=0.1)


def test_all_batches_of_an_update_are_counted(clock):
    _, trainer, model, loader = _setup(clock, 0.02, 0.05, "--accumulate 3")
    found = profile(trainer, model, loader, 1.0, 2)
    assert found.images == 12
    assert found.images_per_s(found.loader) == pytest.approx(4 / 0.02, rel=0.01)
    assert found.images_per_s(found.compute) == pytest.approx(4 / 0.1, rel=0.01)  # at two sizes
    assert found.images_per_s(found.end_to_end) == pytest.approx(4 / 0.12, rel=0.01)


@pytest.fixture
def call(photos, tmp_path, monkeypatch):
    """Run train_dali.py on photos into tmp_path / "run"; returns the exit code."""
    line = "--arch parallel_resnet10 --width-mult 0.25 --stem small --sizes 32 24 -b 4 --workers 1"
    words = [*line.split(), "--data", str(photos), "--output", str(tmp_path / "run")]

    def run(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train_dali.py", *words, "--profile-steps", "2", *more])
        return main("train_dali.py", DaliOptions, make_loaders)

    return run


@pytest.mark.usefixtures("drawn_plots")
def test_a_command_leaves_figures_a_plot_and_a_trace_and_no_run(call, tmp_path, capsys):
    run = tmp_path / "run"
    assert call("--profile") == 0
    out = capsys.readouterr().out
    assert "bottleneck: the " in out
    assert {p.name for p in run.iterdir()} == {"profile"}
    figures = json.loads((run / "profile" / "profile.json").read_text())
    assert len(figures["compute"]["steps"]) == 2
    assert figures["images_per_s"]["compute"] == pytest.approx(
        4000 / (sum(figures["compute"]["steps"]) / 2)
    )
    assert (run / "profile" / "profile.png").read_bytes().startswith(b"\x89PNG")
    with gzip.open(run / "profile" / "trace.json.gz") as trace:
        assert json.load(trace)["traceEvents"]


@pytest.mark.slow
def test_wandb_has_the_figures_the_plot_and_the_files(call, wandb_server, capsys):
    assert call("--profile-sweep", "workers", "--wandb-name", "mine") == 0
    ((run_id, (line,)),) = wandb_server.history.items()
    assert f"W&B: online at {wandb_server.url}/me/rsnet/runs/{run_id}" in capsys.readouterr().out
    assert line["profile/images_per_s/end_to_end"] > 0
    assert line["profile/ms/forward 32"] > 0
    assert line["profile/images_per_s/best"] > 0
    assert {"profile.json", "sweep.json", "trace.json.gz"} < wandb_server.files
    assert any(name.startswith("media/images/profile/plot_") for name in wandb_server.files)
    assert wandb_server.config[run_id]["global_batch"]["value"] == 4
    assert wandb_server.exit_codes == {run_id: 0}


@pytest.mark.slow
@pytest.mark.usefixtures("no_wandb_key")
def test_a_profile_without_wandb_costs_a_line(call, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("it is gone")

    monkeypatch.setattr(wandb_service, "log_profile", fail)
    assert call("--profile", "--wandb", "offline") == 0
    folder = tmp_path / "run" / "profile"
    lost = f"W&B: lost (it is gone); all of it is in {folder}"
    assert capsys.readouterr().out.splitlines()[-1] == lost
    assert (folder / "profile.json").exists()
    assert list((tmp_path / "run").iterdir()) == [
        folder
    ]  # a training begins there as if nothing were

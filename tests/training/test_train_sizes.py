"""Training on smaller images than those of the evaluation: sizes name their BatchNorm."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipelines.synthetic import SyntheticOptions
from rsnet.checkpoint import io as checkpoint
from rsnet.config.command_line import parse
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import resolve
from rsnet.loggers.console import ConsoleLogger
from rsnet.loggers.run_context import RunContext
from rsnet.models.factory import create_model
from rsnet.models.shapes import gmacs
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.profiler.run import ProfileRun
from tests.helpers import synthetic_run

SMALLER = ["--sizes", "32", "16", "--train-size-scale", "0.875"]


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, int]]:
    """(pixels, size) of each pass in training."""
    passes, forward = [], ResolutionSwitchable.forward

    def spy(self, x, size=None):
        if self.training:
            passes.append((x.shape[-1], size))
        return forward(self, x, size)

    monkeypatch.setattr(ResolutionSwitchable, "forward", spy)
    return passes


def test_a_size_trains_on_its_smaller_images_and_is_evaluated_at_its_own(seen, tmp_path, capsys):
    run = tmp_path / "run"
    synthetic_run.train(run, *SMALLER, "--epochs", "1")
    assert set(seen) == {(28, 32), (12, 16)}
    assert "sizes         28 12 in training, 32 16 in evaluation" in capsys.readouterr().out
    saved = checkpoint.load(run / "checkpoints" / "best.pt")
    assert saved.network.sizes == (32, 16)
    evaluate = ["--evaluate", "--resume", str(run / "checkpoints" / "best.pt")]
    synthetic_run.train(tmp_path / "again", *SMALLER[:3], *evaluate)
    results, again = (
        json.loads(path.read_text())
        for path in (run / "results.json", tmp_path / "again" / "evaluation.json")
    )
    assert again["32"]["loss"] == pytest.approx(results["32"]["loss"], rel=1e-5)

    # The same command goes on with the same sizes, also where it does not say them.
    seen.clear()
    synthetic_run.train(run, *SMALLER[:3], "--resume", "auto", "--epochs", "2")
    assert set(seen) == {(28, 32), (12, 16)}


def test_a_profile_counts_the_work_of_the_smaller_images():
    config, options = parse(SyntheticOptions, ["--data", ".", *SMALLER])
    network = ModelConfig("parallel_resnet10", 3, (32, 16), width_mult=0.125)
    model = create_model(network)
    unused: Any = None
    context = RunContext(
        script="rsnet train",
        config=resolve(config, world_size=1, device_type="cpu", has_bf16=False),
        options=options,
        network=network,
        model=model,
        loaders=unused,
        device=unused,
        console=ConsoleLogger(active=False),
    )
    assert ProfileRun(context).cost == gmacs(model, 28) + gmacs(model, 12)

"""train_dali.py with quantized networks, as a user calls it."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from pipelines.dali import DaliOptions, make_loaders
from rsnet.checkpoint import io as checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.train import main
from tests.scripts.test_short_recipe import _stops_before

RUN = ["--arch", "parallel_resnet10", "--width-mult", "0.125", "--stem", "small", "--workers", "1"]
RUN += ["--sizes", "32", "24", "16", "--batch-size", "8", "--wandb", "disabled", "--amp", "off"]
BOTH = ["--mode", "preact", "--qw", "2", "--qa", "2"]


@pytest.fixture
def train(monkeypatch, capsys):
    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train_dali.py", *map(str, words)])
        code = main("train_dali.py", DaliOptions, make_loaders)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """One epoch in full precision and quantized, of ResNets and of pre-activation ResNets."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {
        "plain": [], "weights": ["--qw", "2"], "preact": ["--mode", "preact"], "both": BOTH,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, words in kinds.items():
            line = ["--data", photos, *RUN, *words, "--epochs", 1, "-c", folder / name]
            patch.setattr(sys, "argv", ["train_dali.py", *map(str, line)])
            assert main("train_dali.py", DaliOptions, make_loaders) == 0
    return folder


def _last(run):
    return run / "checkpoints" / "last.pt"


@pytest.mark.slow
def test_a_quantized_run_has_the_originals_recipe(runs):
    config = json.loads((runs / "weights" / "config.json").read_text())
    found = {
        k: config[k] for k in ("lr_decay", "weight_decay", "decay", "opt", "schedule", "gamma")
    }
    assert config["lr"] == pytest.approx(0.1 * 8 / 256)
    assert found == {
        "lr_decay": "schedule", "weight_decay": 5e-5, "decay": "weights", "opt": "nesterov",
        "schedule": [30, 60, 85, 95, 105], "gamma": 0.1,
    }  # fmt: skip


@pytest.mark.slow
def test_a_stopped_quantized_run_goes_on_to_the_same_bits(train, photos, tmp_path, monkeypatch):
    line = ["--data", photos, *RUN, *BOTH, "--epochs", 2, "--ema", 0.9]
    assert train(*line, "-c", tmp_path / "whole")[0] == 0

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.dali.loader.DaliLoader.set_epoch", _stops_before(1, stop))
    assert train(*line, "-c", tmp_path / "parts")[0] == 130
    monkeypatch.undo()
    # It knows what it is from its checkpoint.
    assert train("--data", photos, *RUN, "--resume", "auto", "-c", tmp_path / "parts")[0] == 0
    whole, parts = (checkpoint.load(_last(tmp_path / name)) for name in ("whole", "parts"))
    for key in ("model", "ema"):
        expected, found = getattr(whole, key), getattr(parts, key)
        assert expected.keys() == found.keys()
        assert any(name.endswith("before.basis") for name in expected)
        different = [n for n, v in expected.items() if not torch.equal(v, found[n])]
        assert different == []


@pytest.mark.parametrize("name", ["weights", "both"])
def test_one_size_of_a_quantized_network_is_evaluated_alone(train, photos, runs, tmp_path, name):
    line = ["--data", photos, "--evaluate", "--resume", _last(runs / name), "--workers", 1]
    line += ["--batch-size", 8, "--amp", "off"]
    assert train(*line, "-c", tmp_path / "all")[0] == 0
    assert train(*line, "--sizes", 24, "-c", tmp_path / "one")[0] == 0
    everything, one = (
        json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("all", "one")
    )
    assert one["24"] == everything["24"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "words"),
    [("plain", ["--qw", "2"]), ("preact", BOTH)],
)
def test_training_starts_from_a_full_precision_run(train, photos, runs, tmp_path, source, words):
    line = ["--data", photos, *RUN, *words, "--epochs", 1, "--lr", 1e-9, "-c", tmp_path / "run"]
    code, _, err = train(*line, "--init-from", _last(runs / source))
    assert code == 0, err
    before, after = checkpoint.load(_last(runs / source)), checkpoint.load(_last(tmp_path / "run"))
    shared = 0
    for name, value in before.model.items():
        if name.endswith(".weight"):
            original = name.replace(".weight", ".parametrizations.weight.original")
            now = after.model.get(original, after.model.get(name))
            torch.testing.assert_close(now, value, atol=1e-6, rtol=1e-4)
            shared += original in after.model
    assert shared >= 8
    # The same command goes on, also without the file that it started from.
    assert train(*line, "--epochs", 2, "--resume", "auto")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--qa", "2"], "--qa 2: activations are quantized in --mode preact or preact_typeA; in --mode"
         " resnet the weights alone, as in the original"),
        (["--qw", "0"], "--qw 0: from 1 to 8, or 32 for full precision"),
        (["--qw", "16"], "--qw 16: from 1 to 8"),
        (["--mode", "preact", "--qa", "9"], "--qa 9: from 1 to 8"),
        (["--qw", "2", "--fixed-qa"], "--fixed-qa: there are no quantized activations without --qa"),
        (["--mode", "preact", "--pretrained", "default"], "no library has pre-activation ResNets"),
        (["--mode", "preact", "--arch", "parallel_mobilenetv2"], "--mode preact: there is no such "
         "parallel_mobilenetv2"),
        (["--qw", "2", "--pretrained", "x.pt"], "--pretrained: there is no run, checkpoint or release x.pt"),
        (["--qw", "2", "--pretrained", "default", "--freeze", "backbone"], "backbone: the quantizers"),
        ([*BOTH, "--blurpool"], "--blurpool: blurring moves activations off the levels of --qa 2"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(train, photos, tmp_path, words, message):
    code, _, err = train("--data", photos, *RUN, *words, "-c", tmp_path / "run")
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        ("both", ["--mode", "preact", "--qw", "4"], "--qw is 2 there and 4 here"),
        ("plain", ["--qw", "2"], "--qw is 32 there and 2 here; to start from it in full "
         "precision, give it to --pretrained"),
        ("weights", ["--qw", "32"], "--qw is 2 there and 32 here"),
        ("weights", ["--mode", "preact"], "--mode is resnet there and preact here"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_bits_is_refused(
    train, photos, runs, tmp_path, source, words, message
):
    line = [
        "--data",
        photos,
        *RUN,
        *words,
        "-c",
        tmp_path / "run",
        "--resume",
        _last(runs / source),
    ]
    code, _, err = train(*line)
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err


def test_a_plain_command_does_not_go_on_with_a_quantized_run_by_itself(train, photos, runs):
    before = sorted((p, p.stat().st_mtime_ns) for p in (runs / "both").rglob("*"))
    line = ["--data", photos, *RUN, "--mode", "preact", "-c", runs / "both", "--epochs", 1]
    code, _, err = train(*line)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "already holds a run with other options (--qw 2 -> 32, --qa 2 -> 32)" in err
    assert sorted((p, p.stat().st_mtime_ns) for p in (runs / "both").rglob("*")) == before


def test_a_schedule_that_no_epoch_reaches_is_said(train, photos, tmp_path):
    line = ["--data", photos, *RUN, "--qw", 2, "--epochs", 1, "-c", tmp_path / "run"]
    assert "the learning rate stays at 0.003125: --epochs 1 end before" in train(*line)[1]


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        ("weights", ["--qw", "2"], "it is quantized itself; --resume goes on with it"),
        ("preact", ["--qw", "2", "--mode", "resnet"], "--mode is preact there and resnet here"),
        (
            "plain",
            ["--qw", "2", "--normalize", "unit"],
            "--normalize is imagenet there and unit here",
        ),
    ],
)
def test_what_does_not_fit_is_not_started_from(
    train, photos, runs, tmp_path, source, words, message
):
    line = [
        "--data",
        photos,
        *RUN,
        *words,
        "-c",
        tmp_path / "run",
        "--init-from",
        _last(runs / source),
    ]
    code, _, err = train(*line)
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err


def test_the_last_gammas_start_at_zero_in_a_quantized_resnet_alone():
    def zeros(**options) -> int:
        model = create_model(
            ModelConfig("parallel_resnet18", 4, (32,), width_mult=0.125, **options)
        )
        return sum(
            p.numel() > 0 and not p.any()
            for n, p in model.named_parameters()
            if n.endswith("weight")
        )

    assert zeros(qw=2) == 8
    assert zeros() == zeros(mode="preact", qw=2, qa=2) == zeros(mode="preact") == 0

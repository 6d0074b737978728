"""train_dali.py with what the short recipe and its neighbours add, as a user calls it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torchvision
from torchvision.models.resnet import BasicBlock

from pipelines.dali import DaliOptions, make_loaders
from rsnet.checkpoint import io as checkpoint
from rsnet.train import main

RUN = ["--arch", "parallel_resnet10", "--width-mult", "0.125", "--stem", "small", "--workers", "1"]
RUN += ["--sizes", "32", "24", "16", "--batch-size", "8", "--wandb", "disabled", "--amp", "off"]
MODERN = [
    "--recipe", "short", "--ema", "0.5", "--mixup", "0.2", "--cutmix", "1", "--auto-augment", "trivial",
    "--sizes-per-step", "2", "--blurpool", "--random-erase", "0.5", "--ra-reps", "2",
    "--train-size-scale", "0.875",
]  # fmt: skip


@pytest.fixture
def train(monkeypatch, capsys):
    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train_dali.py", *map(str, words)])
        code = main("train_dali.py", DaliOptions, make_loaders)
        return code, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_a_short_run_resumes_to_the_same_weights_and_evaluates_its_average(
    train, photos, tmp_path, monkeypatch
):
    code, _, err = train("--data", photos, *RUN, *MODERN, "--epochs", 2, "-c", tmp_path / "whole")
    assert code == 0, err
    command = (tmp_path / "whole" / "command.txt").read_text()
    for flag in ("--recipe short", "--decay weights", "--ema 0.5", "--label-smoothing 0.1"):
        assert flag in command
    whole = checkpoint.load(tmp_path / "whole" / "checkpoints" / "last.pt")

    # The same in two parts, the second told nothing but where to go on.
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.dali.loader.DaliLoader.set_epoch", _stops_before(1, stop))
    parts = ["--data", photos, *RUN, *MODERN, "--epochs", 2, "-c", tmp_path / "parts"]
    assert train(*parts)[0] == 130
    monkeypatch.undo()
    assert train("--data", photos, *RUN, "--resume", "auto", "-c", tmp_path / "parts")[0] == 0
    parts_end = checkpoint.load(tmp_path / "parts" / "checkpoints" / "last.pt")
    for key in ("model", "ema"):
        for name, value in getattr(whole, key).items():
            assert torch.equal(value, getattr(parts_end, key)[name]), (key, name)

    last = tmp_path / "whole" / "checkpoints" / "last.pt"
    evaluate = ["--data", photos, "--evaluate", "--resume", last, "--workers", 1, "--amp", "off"]
    assert train(*evaluate, "-c", tmp_path / "e")[0] == 0
    again = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    for name in ("32", "24", "16", "ensemble"):
        assert again[name]["loss"] == pytest.approx(results[name]["loss"], rel=1e-5)
    assert not torch.equal(whole.ema["network.conv1.weight"], whole.model["network.conv1.weight"])


def _stops_before(epoch, stop):
    from pipelines.dali.loader import DaliLoader

    original = DaliLoader.set_epoch

    def set_epoch(self, number):
        if number == epoch:
            stop()
        original(self, number)

    return set_epoch


@pytest.mark.slow
def test_a_run_can_start_from_an_ordinary_networks_weights(train, photos, tmp_path):
    plain = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=1000)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    words = ["--data", photos, "-a", "parallel_resnet10", "--sizes", 32, 16, "-b", 8, "--epochs", 1]
    words += ["--lr", 1e-9, "--wd", 0, "--amp", "off", "--wandb", "disabled", "--workers", 1]
    code, _, err = train(*words, "--pretrained", tmp_path / "plain.pth", "-c", tmp_path / "run")
    assert code == 0, err
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt").model
    torch.testing.assert_close(
        state["network.layer3.0.conv1.weight"], plain.layer3[0].conv1.weight.detach()
    )
    assert state["network.fc.weight"].shape == (3, 512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes-per-step", 4], "--sizes-per-step 4: --sizes has only 3"),
        (["--sizes-per-step", 0], "--sizes-per-step 0: at least 2 sizes"),
        (["--sizes-per-step", 1], "--sizes-per-step 1: only the largest size would be trained"),
        (["--ema", 1], "--ema 1.0: must be at least 0 and less than 1"),
        (["--mixup", -1], "--mixup -1.0: must be from 0 to 100"),
        (["--recipe", "old"], "invalid choice 'old' for argument '--recipe'"),
        (
            ["--pretrained", "none.pth"],
            "--pretrained: there is no run, checkpoint or release none.pth",
        ),
    ],
)
def test_a_mistake_is_one_line(train, photos, tmp_path, options, message):
    code, _, err = train("--data", photos, *RUN, *options, "-c", tmp_path / "run")
    assert code == 2
    assert f"error: {message}" in err
    assert err.count("\n") == 1

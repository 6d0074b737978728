"""`rsnet release`: what is printed, and what is refused."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from rsnet.__main__ import main
from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from tests.helpers.runs import (
    NETWORK,
    trained,
    write_run,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run")


def test_it_says_what_was_taken_and_written(run, tmp_path, capsys):
    assert main(["release", str(run), "--output", str(tmp_path / "new" / "release")]) == 0
    taken, written = capsys.readouterr().out.splitlines()
    assert taken == (
        f"run {run}: parallel_resnet10, sizes 64 48 32, weights after epoch 2 in best.pt"
    )
    size = (tmp_path / "new" / "release" / "model.safetensors").stat().st_size / 1e6
    assert written == (f"{tmp_path}/new/release: parallel_resnet10, sizes 64 48 32, {size:.1f} MB")


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "link"])
def test_what_exists_is_not_overwritten(run, tmp_path, capsys, kind):
    there = tmp_path / "there"
    if kind == "file":
        there.write_text("mine")
    elif kind == "link":
        there.symlink_to("nowhere")
    else:
        there.mkdir()
        if kind == "folder":
            (there / "config.json").write_text("mine")
    assert main(["release", str(run), "--output", str(there)]) == 2
    assert capsys.readouterr().err == (
        f"rsnet release: error: --output: {there} exists; give another name\n"
    )
    assert os.listdir(tmp_path) == ["there"]
    mine = there / "config.json" if kind == "folder" else there
    assert kind in ("link", "empty") or mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["none", "--output", "o"], 2, "there is no run, checkpoint or release none"),
        (
            ["empty", "--output", "o"],
            2,
            "empty holds neither a run with checkpoints/best.pt nor a release",
        ),
        (["junk.pt", "--output", "o"], 1, "junk.pt is no readable checkpoint"),
        (["small.pt", "--output", "o"], 1, "small.pt: Error(s) in loading state_dict"),
        (["odd.pt", "--output", "o"], 1, "network.classes has 4 names, network.num_classes is 3"),
        (["--output", "o"], 2, "RUN"),
        (["run"], 2, "--output"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, words, code, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("junk.pt").write_bytes(b"junk")
    config = ModelConfig.from_dict(NETWORK)
    checkpoint.save(Path("small.pt"), Checkpoint(config, {"alpha": torch.ones(3)}))
    odd = dataclasses.replace(config, classes=("ant",) * 4)
    checkpoint.write(Path("odd.pt"), Checkpoint(odd, trained(NETWORK, 1)).to_dict())
    assert main(["release", *words]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not [name for name in os.listdir() if name.startswith("o.") or name == "o"]

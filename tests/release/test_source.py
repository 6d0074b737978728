"""What the argument of a command may name, and that all of it is the same network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.utils.errors import DataError, UsageError
from rsnet.checkpoint import io
from rsnet.checkpoint.authors_pytorch import to_original
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.release import package
from rsnet.release.from_run import release_run, released
from rsnet.release.source import open_source
from tests.helpers.runs import NETWORK, SIZES, assert_same_logits, reference, trained, write_run
from tests.helpers.tensorflow_graph import Graph, saved

NAMES = {
    "run": ".",
    "its folder of checkpoints": "checkpoints",
    "checkpoint": "checkpoints/best.pt",
    "release": "../release",
    "the release's weights": "../release/model.safetensors",
    "the release's description": "../release/config.json",
}


@pytest.mark.parametrize("kind", NAMES)
def test_whatever_names_a_network_gives_the_same_one_and_says_what_it_is(run, written, kind):
    expected = reference(io.load(run / "checkpoints" / "best.pt"))
    path = run / NAMES[kind]
    source = open_source(str(path))
    assert_same_logits(source.build(), expected)
    assert_same_logits(source.build([48]), expected, [48])
    (line,) = source.lines()
    first, rest = line.split(": ")
    word = {"its folder of checkpoints": "run"}.get(kind, kind.split("'")[0].split()[-1])
    assert first == f"{word} {path}"
    assert rest.startswith("parallel_resnet10, sizes 64 48 32")
    content, folder = released(source), package.read(written)
    assert content.config == folder.config
    assert all(torch.equal(content.state[name], value) for name, value in folder.state.items())
    assert (
        content.beside("tuned.json").resolve().parent
        == (written if "release" in kind else run).resolve()
    )


@pytest.mark.slow
def test_a_quantized_network_of_a_run_computes_what_its_release_does(tmp_path):
    run = write_run(tmp_path / "run", NETWORK | {"mode": "preact", "qw": 2, "qa": 2})
    source = open_source(run)
    assert source.lines()[0].startswith(
        f"run {run}: parallel_resnet10, 2-bit weights, 2-bit activations, sizes 64 48 32"
    )
    folder = release_run(run, tmp_path / "release")
    content = released(source)
    assert content.config == folder.config
    assert all(torch.equal(content.state[name], value) for name, value in folder.state.items())
    assert_same_logits(open_source(tmp_path / "release").build(), package.build(content, SIZES))


def test_a_run_is_its_best_checkpoint_or_to_go_on_its_last(tmp_path):
    run = write_run(tmp_path / "run")
    config = ModelConfig.from_dict(NETWORK)
    last = run / "checkpoints" / "last.pt"
    io.save(last, Checkpoint(config, trained(NETWORK, 2), epoch=3))
    assert [open_source(run, newest=n).file.name for n in (False, True)] == ["best.pt", "last.pt"]
    (run / "checkpoints" / "best.pt").unlink()
    assert open_source(run).lines()[0].endswith("weights after epoch 3 in last.pt")


def test_what_is_found_out_about_other_checkpoints_lies_under_their_names(run, tmp_path):
    loose = Path(shutil.copy(run / "checkpoints" / "best.pt", tmp_path / "loose.pt"))
    assert released(open_source(loose)).beside("tuned.json") == tmp_path / "loose.pt-tuned.json"
    mine = run / "checkpoints" / "mine.pt"
    shutil.copy(loose, mine)
    assert released(open_source(mine)).beside("tuned.json") == mine.with_name("mine.pt-tuned.json")
    mine.unlink()


def test_averaged_weights_are_taken_and_said(tmp_path):
    run = write_run(tmp_path / "run", ema=trained(NETWORK, 7))
    source = open_source(run)
    assert "averaged weights after epoch 2 in best.pt" in source.lines()[0]
    assert_same_logits(source.build(), reference(io.load(source.file)))


def test_a_file_of_the_authors_trainer_says_that_its_sizes_are_assumed(tmp_path):
    config = ModelConfig("parallel_resnet18", 3, (40, 32))
    path = tmp_path / "model_best.pth.tar"
    torch.save(to_original(Checkpoint(config, trained(config.to_dict(), 1), epoch=5)), path)
    source = open_source(path, sizes=(40, 32))
    line, note = source.lines()
    assert line == (
        f"file of the original code {path}: parallel_resnet18, sizes 40 32, weights after epoch 5"
    )
    assert "does not say its sizes; 40 32 is assumed" in note
    assert source.run_dir is None


@pytest.mark.slow
def test_a_file_of_tensorpack_names_its_sizes(tmp_path):
    path = tmp_path / "model.npz"
    variables = saved(Graph(18, "resnet", qw=2, qa=32), (64, 33))
    np.savez(path, **{f"{name}:0": value.numpy() for name, value in variables.items()})
    source = open_source(path)
    assert source.lines() == [
        f"file of the original code {path}: parallel_resnet18, 2-bit weights, sizes 64 33, weights"
    ]
    assert source.build([33]).sizes == (33,)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none", None, UsageError, "there is no run, checkpoint or release none"),
        ("empty", {}, UsageError, "empty holds neither a run with checkpoints/best.pt nor a rel"),
        ("begun", {"metrics.jsonl": "", "config.json": "{}"}, UsageError, "begun holds neither a"),
        ("theirs", {"config.json": '{"architecture": "x"}'}, DataError, "is of format None"),
        ("weights", {"model.safetensors": "x"}, DataError, "config.json: there is no such file"),
        ("model-3", None, UsageError, "there is no run, checkpoint or release model-3"),
        ("some.npz", None, UsageError, "there is no file some.npz"),
    ],
)
def test_what_is_no_network_is_one_line(tmp_path, monkeypatch, name, content, error, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).mkdir()
        for file, text in content.items():
            Path(name, file).write_text(text)
    with pytest.raises(error) as caught:
        open_source(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_copied_release_is_the_same_and_what_was_measured_on_a_machine_is_left(written, tmp_path):
    shutil.copytree(written, tmp_path / "release")
    for name in ("tuned.json", "latency-cpu.json"):
        (tmp_path / "release" / name).write_text("{}")
    lines: list[str] = []
    copied = release_run(tmp_path / "release", tmp_path / "copy", lines.append)
    assert lines[0].startswith(f"release {tmp_path}/release: ")
    assert sorted(os.listdir(tmp_path / "copy")) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tuned.json",  # of these weights, on any machine
    ]
    for name in os.listdir(tmp_path / "copy"):
        same = (tmp_path / "release" / name).read_bytes()
        assert (tmp_path / "copy" / name).read_bytes() == same
    assert copied.folder == tmp_path / "copy"
    with pytest.raises(UsageError, match="exists; give another name"):
        release_run(written, tmp_path / "copy")

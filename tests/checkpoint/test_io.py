"""Checkpoints are whole, checked, safe and self-describing."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from pathlib import Path

import pytest
import torch
import torchvision

from pipelines.utils.errors import DataError, UsageError
from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.checkpoint.weights import load_weights, require_match
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.fine_tune import start_from

NETWORK = {
    "arch": "parallel_resnet18",
    "width_mult": 1.0,
    "sizes": [48, 40, 32],
    "num_classes": 3,
    "classes": ["ant", "bee", "cat"],
}


CONFIG = ModelConfig.from_dict(NETWORK)


def _saved_epoch(epoch: int) -> Checkpoint:
    return Checkpoint(CONFIG, {"w": torch.arange(4.0)}, epoch=epoch)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save(path, _saved_epoch(3))
    return path


def test_what_is_saved_is_loaded(saved):
    loaded = checkpoint.load(saved)
    assert loaded.epoch == 3
    assert loaded.network == CONFIG
    assert torch.equal(loaded.model["w"], torch.arange(4.0))


def test_a_checkpoint_becomes_the_content_of_its_file_and_back():
    """The keys are those that version 0.1.0 wrote; what training has no state of is left out."""
    weights = {"w": torch.arange(4.0)}
    plain = Checkpoint(CONFIG, weights).to_dict()
    run = ["best", "config", "done", "epoch", "global_batch", "loader", "step", "wandb_id"]
    assert sorted(plain) == sorted(["format", "network", "model", *run])
    loader = {"epoch": 1, "position": 3, "seed": 0, "samples": 9, "data": "", "order": ""}
    rank = {"buffers": [], "means": [], "rng": weights["w"], "cuda_rng": None}
    whole = Checkpoint(
        CONFIG, weights, ema=weights, config={"lr": 0.1}, global_batch=8, epoch=1, done=2, step=7,
        loader=loader, best=[1.0], wandb_id="x", optimizer={"state": {}, "param_groups": []},
        scaler={}, guard=[0, 0], ranks=[rank],
    )  # fmt: skip
    added = set(whole.to_dict()) - set(plain)
    assert added == {"ema", "optimizer", "scaler", "guard", "ranks"}
    assert Checkpoint.from_dict(whole.to_dict()) == whole
    assert whole.eval_weights is whole.ema


def test_the_hash_beside_it_is_sha256sums(saved):
    line = saved.with_name("last.pt.sha256").read_text()
    assert line == f"{hashlib.sha256(saved.read_bytes()).hexdigest()}  last.pt\n"


def test_a_crash_between_hash_and_file_leaves_the_old_checkpoint_valid(saved, monkeypatch):
    real = Path.replace

    def crash(self, target):
        if Path(target).name == "last.pt":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved, _saved_epoch(4))
    assert checkpoint.load(saved).epoch == 3


@pytest.mark.parametrize("position", [10, 200, -30])
def test_a_flipped_bit_is_noticed(saved, position):
    data = bytearray(saved.read_bytes())
    data[position] ^= 1
    saved.write_bytes(data)
    with pytest.raises(DataError, match=r"last.pt is damaged"):
        checkpoint.load(saved)


class _Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def _write_malicious(path):
    torch.save({"format": 1, "x": _Malicious()}, path)


def _write_cut_legacy(path):
    torch.save({"format": 1}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"<html>404</html>"),
        lambda p: p.write_bytes(p.read_bytes()[:100]),
        lambda p: torch.save([1, 2], p),
        lambda p: torch.save({"state_dict": {}}, p),
        _write_malicious,
        lambda p: torch.save({"format": 1}, p),
        _write_cut_legacy,
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(saved, write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    saved.with_name("last.pt.sha256").unlink()
    write(saved)
    with pytest.raises(DataError, match=r"last.pt is no") as error:
        checkpoint.load(saved)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_may_have_any_name_and_any_class(saved, tmp_path):
    names = (os.fsdecode(b"caf\xe9"), "a\n")
    content = checkpoint.load(saved)
    network = dataclasses.replace(content.network, classes=names)
    path = tmp_path / os.fsdecode(b"x\xff.pt")
    checkpoint.save(path, dataclasses.replace(content, network=network))
    assert checkpoint.load(path).network.classes == names
    (tmp_path / "x\udcff.pt").write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        checkpoint.load(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UsageError, match=f"there is no checkpoint {tmp_path}/x.pt"):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"arch": "parallel_resnet50"},
            "--arch is parallel_resnet18 there and parallel_resnet50 here",
        ),
        ({"num_classes": 5}, "--num-classes is 3 there and 5 here"),
        ({"classes": ["ant", "bee", "dog"]}, "class 2 is cat there and dog here"),
        ({"classes": ["ant", "bee", "cat", "dog"]}, "class 3 is missing there and dog here"),
        ({"classes": ["ant", "bee"]}, "class 2 is cat there and missing here"),
        ({"sizes": [48, 40]}, "--sizes is 48 40 32 there and 48 40 here"),
        ({"width_mult": 0.5}, "--width-mult is 1.0 there and 0.5 here"),
    ],
)
def test_what_differs_is_named(change, message):
    with pytest.raises(UsageError, match=message):
        require_match(CONFIG, ModelConfig.from_dict(NETWORK | change), training=True)


def test_an_evaluation_may_take_some_of_the_sizes_but_no_others():
    require_match(CONFIG, CONFIG.with_sizes([40]), training=False)
    with pytest.raises(UsageError, match="--sizes"):
        require_match(CONFIG, CONFIG.with_sizes([40, 36]), training=False)


def test_sizes_that_calibrate_added_take_part_in_what_starts_from_them(tmp_path):
    trained = create_model(ModelConfig("parallel_resnet18", 3, (48, 40, 32), width_mult=0.125))
    with torch.no_grad():
        trained.alpha.copy_(torch.tensor([1.0, -torch.inf, 3.0]))
    network = dataclasses.replace(CONFIG, width_mult=0.125)
    checkpoint.save(tmp_path / "x.pt", Checkpoint(network, trained.state_dict()))
    model = create_model(ModelConfig("parallel_resnet18", 3, (48, 40, 32), width_mult=0.125, qw=2))
    saved = checkpoint.load(tmp_path / "x.pt")
    start_from(model, dataclasses.replace(network, qw=2), saved, "x.pt")
    assert model.alpha.tolist() == [1.0, 2.0, 3.0]


def test_weights_that_do_not_fit_are_listed_by_name_and_shape():
    model = ResolutionSwitchable(torchvision.models.resnet18(num_classes=3), (48, 32))
    state = copy.deepcopy(model.state_dict())
    state["network.fc.weight"] = torch.zeros(4, 512)
    del state["network.conv1.weight"]
    with pytest.raises(DataError, match=r"conv1.weight.*fc.weight.*\[4, 512\]") as error:
        load_weights(model, state, (48, 32))
    assert "\n" not in str(error.value)


def test_what_could_not_be_loaded_is_not_written(tmp_path):
    network = ModelConfig("parallel_resnet18", 2, (32,), width_mult=0.001)
    with pytest.raises(
        DataError, match=r"network\.width_mult is 0\.001, must be a number from 0\.01"
    ):
        checkpoint.save(tmp_path / "x.pt", Checkpoint(network, {}))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_not_damaged(tmp_path, monkeypatch):
    path, digest = tmp_path / "last.pt", checkpoint.sha256_file
    checkpoint.write(path, {"a": 1})

    def replaced(file):
        checkpoint.write(file, {"a": 2})
        return digest(file)

    monkeypatch.setattr(checkpoint, "sha256_file", replaced)
    with pytest.raises(DataError, match="is no checkpoint of this trainer"):  # but it was read
        checkpoint.load(path)

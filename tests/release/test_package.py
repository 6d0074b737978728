"""Releases: what is written and read back, and damaged or manipulated folders, which are refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from safetensors import safe_open
from torch import nn

from pipelines.normalize import MEAN_STD
from pipelines.utils.errors import UsageError
from rsnet import __version__
from rsnet.__main__ import main
from rsnet.checkpoint import io as checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.release import model_card as release_card
from rsnet.release import package as release
from tests.helpers.runs import (
    NETWORK,
    SIZES,
    assert_same_logits,
    read_config,
    reference,
    refusal,
    rewrite_weights,
    write_run,
)


def test_weights_that_are_no_numbers_are_refused(folder, capsys):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["network.conv1.weight"][0, 0, 0, 0] = torch.nan
    rewrite_weights(folder, safetensors.torch.save(state))
    code, err = refusal(folder, capsys)
    assert code == 1
    assert "model.safetensors: has numbers that are not finite: network.conv1.weight" in err


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "shared", "stem": "small", "blurpool": True},
        {"qw": 2, "tf_padding": True},
        {"mode": "preact", "qw": 3, "qa": 2},
    ],
    ids=["private", "shared_small_blurred", "quantized", "quantized_activations"],
)
def test_a_release_computes_the_checkpoints_logits_bit_for_bit(tmp_path, changes):
    run = write_run(tmp_path / "run", NETWORK | changes)
    assert main(["release", str(run), "--output", str(tmp_path / "release")]) == 0
    model = release.load(tmp_path / "release")
    assert not model.training
    card = (tmp_path / "release" / "README.md").read_text()
    assert ("BatchNorm" in card) == (model.shared_norm is False)
    assert_same_logits(model, reference(checkpoint.load(run / "checkpoints" / "best.pt")))


def test_every_weight_lies_once_in_the_safetensors_file(run, folder):
    state = checkpoint.load(run / "checkpoints" / "best.pt").model
    wanted = {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(wanted)
        assert all(torch.equal(file.get_tensor(name), v) for name, v in wanted.items())
    assert len([name for name in wanted if re.search(r"\.conv\d\.weight", name)]) == 9
    assert len([name for name in wanted if name.startswith("network.bn1.")]) == 4 * len(SIZES)


def test_some_of_the_sizes_are_loaded(run, folder):
    model = release.load(folder, [32, 64])
    assert model.sizes == (64, 32)
    expected = reference(checkpoint.load(run / "checkpoints" / "best.pt"))
    assert_same_logits(model, expected, [64, 32])
    assert model.alpha.tolist() == expected.alpha[[0, 2]].tolist()


def test_sizes_that_it_does_not_have_are_refused(folder):
    with pytest.raises(UsageError, match=r"--sizes is 64 48 32 in .* and 40 here"):
        release.load(folder, [40])
    for sizes in ([], [32, 32]):
        with pytest.raises(UsageError, match="distinct and positive"):
            release.load(folder, sizes)


def test_the_state_that_is_read_is_the_checkpoints_without_counts(run, folder):
    state = checkpoint.load(run / "checkpoints" / "best.pt").model
    found = release.read(folder).state
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], 0 * value if "num_batches" in name else value)


def test_the_config_describes_network_images_and_file(folder):
    config = read_config(folder)
    data = (folder / "model.safetensors").read_bytes()
    assert config["network"] == NETWORK
    assert config["weights"] == {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "averaged": False,
    }
    assert config["source"] == {"run": "run", "checkpoint": "best.pt", "epoch": 2}
    assert config["versions"] == {
        "rsnet": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    prepared = config["preprocessing"]
    assert prepared["short_sides"] == {"64": 73, "48": 54, "32": 36}
    assert (prepared["mean"], prepared["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    mean, std = MEAN_STD["imagenet"]
    assert [255 * m for m in prepared["mean"]] == pytest.approx(mean)
    assert [255 * s for s in prepared["std"]] == pytest.approx(std)


@pytest.mark.slow
def test_quantized_weights_take_their_bits_and_a_basis_a_channel(tmp_path, capsys):
    bits = 2
    network = NETWORK | {"width_mult": 1.0, "qw": bits}
    run, folder = write_run(tmp_path / "run", network), tmp_path / "release"
    assert main(["release", str(run), "--output", str(folder)]) == 0
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    filters = [
        m
        for m in create_model(ModelConfig.from_dict(NETWORK | network | {"qw": 32})).modules()
        if isinstance(m, nn.Conv2d)
    ]
    expected = sum(-(-m.weight.numel() * bits // 8) for m in filters[1:])
    assert sum(v.nbytes for name, v in stored.items() if name.endswith(".codes")) == expected
    bases = [v for name, v in stored.items() if name.endswith(".basis")]
    assert sum(v.nbytes for v in bases) == 4 * bits * sum(m.out_channels for m in filters[1:])
    assert not any(name.endswith((".original", ".total", ".rest")) for name in stored)
    size = (folder / "model.safetensors").stat().st_size
    full = sum(
        v.nbytes for v in release.load(folder).state_dict().values() if v.is_floating_point()
    )
    assert f" {size / 1e6:.1f} MB ({full / 1e6:.1f} MB in float32)" in capsys.readouterr().out
    assert size < 0.085 * full  # of three classes


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_release_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch, capsys, error):
    def fail(_):
        raise error

    monkeypatch.setattr(release_card, "text", fail)
    assert main(["release", str(run), "--output", str(tmp_path / "release")]) in (1, 130)
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_folder_that_appears_meanwhile_stays(run, tmp_path, monkeypatch, capsys):
    real = release_card.text

    def appear(config):
        (tmp_path / "release").mkdir()
        (tmp_path / "release" / "config.json").write_text("mine")
        return real(config)

    monkeypatch.setattr(release_card, "text", appear)
    assert main(["release", str(run), "--output", str(tmp_path / "release")]) == 1
    assert "not empty" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["release"]
    assert (tmp_path / "release" / "config.json").read_text() == "mine"


def test_what_is_no_folder_is_refused(tmp_path, capsys):
    code, line = refusal(tmp_path / "none", capsys)
    assert (code, line) == (2, f"x: error: there is no folder {tmp_path}/none\n")
    run = write_run(tmp_path / "run")
    with pytest.raises(UsageError, match=f"run is a run; rsnet release {run} --output DIR makes"):
        release.load(run)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_refused(folder, capsys, name):
    (folder / name).unlink()
    code, line = refusal(folder, capsys)
    assert code == 1
    assert f"{folder}/{name}: there is no such file" in line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_that_leads_out_is_refused(folder, tmp_path, capsys, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    code, line = refusal(folder, capsys)
    assert code == 1
    assert f"{folder}/{name}: is a link that leads out of the folder" in line
    (folder / name).unlink()
    (tmp_path / name).rename(folder / "inside")
    (folder / name).symlink_to("inside")
    assert release.load(folder).sizes == (64, 48, 32)


def test_a_release_behind_a_link_to_its_folder_is_read(folder, tmp_path):
    (tmp_path / "latest").symlink_to(folder)
    assert release.load(tmp_path / "latest").sizes == (64, 48, 32)


def test_no_name_in_the_config_is_used_as_a_path(folder, tmp_path):
    """There is no field for one; what looks like one is not read."""
    config = read_config(folder)
    config["weights"]["file"] = config["file"] = f"{tmp_path}/other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    assert release.load(folder).sizes == (64, 48, 32)


def test_a_flipped_bit_is_refused(folder, capsys):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, line = refusal(folder, capsys)
    assert code == 1
    assert "model.safetensors: is damaged: its SHA-256 is not that in config.json" in line


def test_a_file_of_another_length_is_refused(folder, capsys):
    path = folder / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 4)
    code, line = refusal(folder, capsys)
    assert code == 1
    assert f"has {size - 4} bytes, config.json says {size}" in line


def test_a_file_larger_than_its_network_is_not_even_read(folder, capsys, monkeypatch):
    read: list[str] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), real(path))[1])
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size + 2**40)  # takes no disk
    code, line = refusal(folder, capsys)
    assert code == 1
    assert "more than the" in line
    assert read == ["config.json"]


def _typed(dtype: str) -> bytes:
    """A file with one tensor of four bytes."""
    header = json.dumps({"x": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-4], "is no safetensors file ("),
        (lambda data: data[:5], "is no safetensors file: a header of"),
        (lambda _: b"", "is no safetensors file: a header of 0 bytes"),
        (lambda _: b"\0" * 5000, "is no safetensors file ("),
        (lambda _: b"{}" * 5000, "is no safetensors file: a header of"),
        (lambda data: (2**63).to_bytes(8, "little") + data[8:], f"a header of {2**63} bytes"),
        (lambda data: (10**6).to_bytes(8, "little") + data[8:], "is no safetensors file ("),
        (
            lambda _: (2**24 + 1).to_bytes(8, "little") + b"{" * (2**24 + 2),
            "a header of 16777217 bytes",
        ),
        (lambda _: _typed("\n\x1b"), r"unknown variant `\n\x1b`"),
        (lambda _: _typed("F" * 9999), "F" * 900),
        (lambda _: _typed("F8_E8M0"), "'F8_E8M0'"),
    ],
    ids=[
        "cut",
        "stub",
        "empty",
        "zeros",
        "text",
        "huge",
        "wrong",
        "oversized",
        "escape",
        "long",
        "type",
    ],
)
def test_what_is_no_safetensors_file_is_refused(folder, capsys, damage, message):
    """Though config.json has its size and its hash."""
    rewrite_weights(folder, damage((folder / "model.safetensors").read_bytes()))
    code, line = refusal(folder, capsys)
    assert code == 1
    assert f"{folder}/model.safetensors: " in line
    assert message in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("network.fc.bias"), "network.fc.bias (3,) is missing"),
        (lambda t: t.update(more=torch.ones(2)), "more (2,) is unknown"),
        (lambda t: t.update({"a\nb\x1b[2J": torch.ones(2)}), r"a\nb\x1b[2J (2,) is unknown"),
        (lambda t: t.update({"n" * 9999: torch.ones(2)}), "n" * 999 + "\n"),
        (
            lambda t: t.update({"network.fc.bias": torch.ones(4)}),
            "network.fc.bias is (4,), not (3,)",
        ),
        (
            lambda t: t.update({"network.fc.bias": torch.ones(3).half()}),
            "network.fc.bias is torch.float16, not torch.float32",
        ),
        (
            lambda t: t.update({"network.fc.bias": torch.ones(3, dtype=torch.int32)}),
            "network.fc.bias is torch.int32, not torch.float32",
        ),
    ],
    ids=["missing", "unknown", "escape", "long", "shape", "dtype", "integers"],
)
def test_tensors_that_do_not_fit_are_refused(folder, capsys, change, message):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    rewrite_weights(folder, safetensors.torch.save(tensors))
    code, line = refusal(folder, capsys)
    assert code == 1
    assert "model.safetensors: does not fit the network in config.json: " in line
    assert message in line


def test_a_builders_complaint_is_one_line(folder, capsys, monkeypatch):
    def complain(_):
        raise RuntimeError("no such\nshapes")

    release._on_meta.cache_clear()
    monkeypatch.setattr(release, "create_model", complain)
    code, line = refusal(folder, capsys)
    assert code == 1
    assert "config.json: such a network cannot be built (no such)" in line


def test_a_network_that_its_file_cannot_hold_takes_no_memory(folder, capsys, monkeypatch):
    """Of so many classes it would take 0.5 GB."""
    config = read_config(folder)
    config["network"]["num_classes"] = 1_000_000
    (folder / "config.json").write_text(json.dumps(config))
    built: list[bool] = []

    def watched(*args):
        model = create_model(*args)
        built.append(all(p.is_meta for n, p in model.named_parameters() if n != "alpha"))
        return model

    monkeypatch.setattr(release, "create_model", watched)
    code, line = refusal(folder, capsys)
    assert code == 1
    assert "network.fc.weight is (3, 128), not (1000000, 128)" in line
    assert built == [True]


def test_an_arch_is_never_built_from_a_description_that_is_refused(folder, monkeypatch, capsys):
    config = read_config(folder)
    del config["gmacs"]
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(release, "create_model", lambda *_: pytest.fail("built"))
    assert "gmacs is missing" in refusal(folder, capsys)[1]


def test_regnet_can_be_built_without_memory():
    """Its builder reads values of tensors, which the meta device does not have."""
    arch = "parallel_regnet_x_400mf"
    network = NETWORK | {"arch": arch, "width_mult": 1.0, "sizes": [128]}
    state = release._on_meta(ModelConfig.from_dict(network)).state_dict()
    real = create_model(ModelConfig(arch, 3, [128])).state_dict()
    assert {n: (v.shape, v.dtype) for n, v in state.items()} == {
        n: (v.shape, v.dtype) for n, v in real.items()
    }
    assert sum(v.nbytes for v in state.values() if not v.is_meta) < 2**20


def test_folders_may_be_strings(folder):
    assert release.load(str(folder)).sizes == tuple(SIZES)
    assert release.read(str(folder)).config == read_config(folder)

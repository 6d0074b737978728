"""`python -m rsnet release`: what is written, what is read back, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
import yaml
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.normalize import MEAN_STD
from pipelines.utils.cli import exit_code
from pipelines.utils.errors import DataError, UsageError
from rsnet import __version__
from rsnet.__main__ import main
from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint.authors_pytorch import to_original
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.release import config as release_config
from rsnet.release import model_card as release_card
from rsnet.release import package as release
from tests.test_environment import PYPROJECT

SIZES = [64, 48, 32]
NETWORK = {
    "arch": "parallel_resnet10",
    "width_mult": 0.25,
    "stem": "imagenet",
    "norm": "private",
    "blurpool": False,
    "mode": "resnet",
    "qw": 32,
    "qa": 32,
    "tf_padding": False,
    "sizes": SIZES,
    "num_classes": 3,
    "classes": ["ant", "bee", "cat"],
    "normalize": "imagenet",
    "eval_crop_ratio": 0.875,
    "interpolation": "triangle, antialiased (PIL's BILINEAR)",
}


def _trained(network: dict, seed: int) -> dict[str, torch.Tensor]:
    """A state dict in which no two BatchNorms, and no two networks, are alike; channels-last."""
    torch.manual_seed(seed)
    model = create_model(ModelConfig.from_dict(network))
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                value.uniform_(0.5, 1.5)
            norm.num_batches_tracked += 7
        model.alpha.uniform_(-1, 1)
    return model.to(memory_format=torch.channels_last).state_dict()


def _write_run(path: Path, network: dict = NETWORK, **content: object) -> Path:
    """A run directory whose best checkpoint is of epoch 2; three epochs were evaluated."""
    checkpoint.write(
        path / "checkpoints" / "best.pt",
        {"format": 1, "network": network, "model": _trained(network, 1), "epoch": 2, **content},
    )
    lines = [{"step": 5, "epoch": 2.0, "train/total": 1.0}]
    for epoch in (1, 2, 3):
        names = [*map(str, network["sizes"]), "ensemble"]
        top1 = {f"val/top1@{name}": 10.0 * epoch + i for i, name in enumerate(names)}
        top5 = {f"val/top5@{name}": 50.0 + epoch + i for i, name in enumerate(names)}
        lines.append({"step": 5 * epoch, "epoch": epoch, **top1, **top5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + '{"step": 2')  # cut short by a crash
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return _write_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def written(run) -> Path:
    folder = run.with_name("release")
    assert main(["release", str(run), "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A release that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "release"))


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def _rewrite(folder: Path, data: bytes) -> None:
    """Other weights, of which config.json has the size and the hash."""
    (folder / "model.safetensors").write_bytes(data)
    config = _config(folder)
    config["weights"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "config.json").write_text(json.dumps(config))


def test_weights_that_are_no_numbers_are_refused(folder, capsys):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["network.conv1.weight"][0, 0, 0, 0] = torch.nan
    _rewrite(folder, safetensors.torch.save(state))
    code, err = _refusal(folder, capsys)
    assert code == 1
    assert "model.safetensors: has numbers that are not finite: network.conv1.weight" in err


def _refusal(folder: Path, capsys) -> tuple[int, str]:
    """Exit code and the only line on stderr."""
    code = exit_code("x", lambda: len(release.load(folder).sizes))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 1500
    return code, err


def _reference(saved: Checkpoint, key: str = "model") -> nn.Module:
    model = create_model(saved.network)
    model.load_state_dict(getattr(saved, key), strict=True)
    return model.eval()


def _assert_same_logits(model: nn.Module, expected: nn.Module, sizes=SIZES) -> None:
    with torch.no_grad():
        for size in sizes:
            images = torch.randn(2, 3, size, size)
            assert torch.equal(model(images), expected(images, size))


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
    run = _write_run(tmp_path / "run", NETWORK | changes)
    assert main(["release", str(run), "--output", str(tmp_path / "release")]) == 0
    model = release.load(tmp_path / "release")
    assert not model.training
    card = (tmp_path / "release" / "README.md").read_text()
    assert ("BatchNorm" in card) == (model.shared_norm is False)
    _assert_same_logits(model, _reference(checkpoint.load(run / "checkpoints" / "best.pt")))


def test_the_averaged_weights_are_released_where_there_are_some(tmp_path, capsys):
    run = _write_run(tmp_path / "run", ema=_trained(NETWORK, 2))
    best = run / "checkpoints" / "best.pt"
    assert main(["release", str(best), "--output", str(tmp_path / "release")]) == 0
    assert f"{best}: averaged weights after epoch 2" in capsys.readouterr().out
    _assert_same_logits(
        release.load(tmp_path / "release"), _reference(checkpoint.load(best), "ema")
    )
    assert _config(tmp_path / "release")["weights"]["averaged"] is True


def test_a_file_of_the_original_is_released(tmp_path, capsys):
    sizes = [224, 192, 160, 128, 96]
    network = {"arch": "parallel_resnet18", "num_classes": 3, "sizes": sizes}
    content = {"network": network, "model": _trained(network, 3), "epoch": 5}
    torch.save(to_original(Checkpoint.from_dict(content)), tmp_path / "model_best.pth.tar")
    words = [str(tmp_path / "model_best.pth.tar"), "--output", str(tmp_path / "release")]
    assert main(["release", *words]) == 0
    assert "after epoch 5" in capsys.readouterr().out
    config, state = dataclasses.astuple(release.read(tmp_path / "release"))
    assert state.keys() == content["model"].keys()
    assert all(
        torch.equal(v, state[n]) for n, v in content["model"].items() if v.is_floating_point()
    )
    assert config["network"]["classes"] == []
    assert config["preprocessing"]["std"] == [1.0, 1.0, 1.0]


def test_what_an_early_checkpoint_does_not_say_is_filled_in(tmp_path):
    late = ("width_mult", "stem", "norm", "blurpool")
    network = {k: v for k, v in NETWORK.items() if k not in late}
    run = _write_run(tmp_path / "run", network)
    assert main(["release", str(run), "--output", str(tmp_path / "release")]) == 0
    assert _config(tmp_path / "release")["network"] == NETWORK | {"width_mult": 1.0}


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
    expected = _reference(checkpoint.load(run / "checkpoints" / "best.pt"))
    _assert_same_logits(model, expected, [64, 32])
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
    config = _config(folder)
    data = (folder / "model.safetensors").read_bytes()
    assert config["network"] == NETWORK
    assert config["weights"] == {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "averaged": False,
    }
    assert config["source"] == {"run": "run", "checkpoint": "best.pt", "epoch": 2}
    assert config["versions"] == {
        "rsnet": PYPROJECT["project"]["version"],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    prepared = config["preprocessing"]
    assert prepared["short_sides"] == {"64": 73, "48": 54, "32": 36}
    assert (prepared["mean"], prepared["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    mean, std = MEAN_STD["imagenet"]
    assert [255 * m for m in prepared["mean"]] == pytest.approx(mean)
    assert [255 * s for s in prepared["std"]] == pytest.approx(std)


def test_the_config_has_what_the_network_costs(run, folder):
    config = _config(folder)
    model = _reference(checkpoint.load(run / "checkpoints" / "best.pt"))
    for size in SIZES:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, size, size))
        assert config["gflops"][str(size)] == pytest.approx(counter.get_total_flops() / 1e9)
    assert config["gflops"]["ensemble"] == pytest.approx(
        sum(config["gflops"][str(s)] for s in SIZES)
    )
    assert sum(config["parameters"].values()) == sum(p.numel() for p in model.parameters())


def test_the_accuracies_are_those_of_the_checkpoints_epoch(folder):
    assert _config(folder)["accuracy"] == {
        "64": {"top1": 20.0, "top5": 52.0},
        "48": {"top1": 21.0, "top5": 53.0},
        "32": {"top1": 22.0, "top5": 54.0},
        "ensemble": {"top1": 23.0, "top5": 55.0},
    }


@pytest.mark.parametrize("case", ["within an epoch", "no evaluation", "no run directory"])
def test_weights_that_were_not_evaluated_have_no_accuracies(tmp_path, capsys, case):
    run = _write_run(tmp_path / "run", done=3 if case == "within an epoch" else 0)
    path = run / "checkpoints" / "best.pt"
    if case == "no evaluation":
        (run / "metrics.jsonl").write_text('{"step": 10, "epoch": 2.0, "train/total": 1.0}\n')
    if case == "no run directory":
        (run / "copies").mkdir()
        path = path.rename(run / "copies" / "best.pt")
    assert main(["release", str(path), "--output", str(tmp_path / "release")]) == 0
    assert "note: their accuracies are not known" in capsys.readouterr().out
    assert release.read(tmp_path / "release").config["accuracy"] is None
    card = (tmp_path / "release" / "README.md").read_text()
    assert "| 64 |  |  | 0." in card
    assert "accuracies are not known" in card


def test_the_card_has_the_hubs_metadata(folder):
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "rsnet",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "resolution-switchable"],
        "metrics": ["accuracy"],
    }
    hub = pytest.importorskip("huggingface_hub", reason="comes with timm, which is an extra")
    card = hub.ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-classification"


def test_the_card_says_what_the_network_is_worth_and_needs(folder):
    card, gflops = (folder / "README.md").read_text(), _config(folder)["gflops"]
    assert f"| 64 | 20.00 | 52.00 | {gflops['64']:.3f} |" in card
    assert f"| ensemble | 23.00 | 55.00 | {gflops['ensemble']:.3f} |" in card
    assert "(64: 73, 48: 54, 32: 36)" in card
    assert "private to one of them: its\nBatchNorm, and its weight in the ensemble." in card
    assert "[0.485, 0.456, 0.406]" in card
    assert "arXiv:2007.09558" in card


def test_the_cards_code_runs(folder, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    monkeypatch.chdir(folder)
    scope: dict = {}
    exec(code, scope)
    assert scope["logits"].shape == (1, 3)


@pytest.mark.parametrize("changes", [{}, {"mode": "preact", "qw": 2, "qa": 2}])
def test_reading_needs_torch_torchvision_and_safetensors_alone_and_no_pickle(tmp_path, changes):
    run, folder = _write_run(tmp_path / "run", NETWORK | changes), tmp_path / "release"
    assert main(["release", str(run), "--output", str(folder)]) == 0
    code = f"""
import pickle, sys
from pathlib import Path
sys.modules["numba"] = None
import safetensors, torch, torchvision
before = {{name.split(".")[0] for name in sys.modules}}
from rsnet import release
loaded = {{name.split(".")[0] for name in sys.modules}} - before - set(sys.stdlib_module_names)
assert loaded <= {{"rsnet", "pipelines"}}, loaded
torch.load = pickle.load = pickle.loads = pickle.Unpickler = None
release.load(Path({str(folder)!r}))(torch.zeros(1, 3, 32, 32))
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_quantized_weights_take_their_bits_and_a_basis_a_channel(tmp_path, capsys):
    bits = 2
    network = NETWORK | {"arch": "parallel_resnet18", "width_mult": 1.0, "qw": bits}
    run, folder = _write_run(tmp_path / "run", network), tmp_path / "release"
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


def test_it_says_what_was_taken_and_written(run, tmp_path, capsys):
    assert main(["release", str(run), "--output", str(tmp_path / "new" / "release")]) == 0
    taken, written = capsys.readouterr().out.splitlines()
    assert taken == f"{run}/checkpoints/best.pt: weights after epoch 2"
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


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["none", "--output", "o"], 2, "there is no checkpoint none"),
        (["empty", "--output", "o"], 2, "there is no checkpoint empty/checkpoints/best.pt"),
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
    small = {"format": 1, "network": NETWORK, "model": {"alpha": torch.ones(3)}}
    checkpoint.write(Path("small.pt"), small)
    odd = NETWORK | {"classes": ["ant"] * 4}
    checkpoint.write(Path("odd.pt"), {"format": 1, "network": odd, "model": _trained(odd, 1)})
    assert main(["release", *words]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not [name for name in os.listdir() if name.startswith("o.") or name == "o"]


def test_what_is_no_folder_is_refused(tmp_path, capsys):
    code, line = _refusal(tmp_path / "none", capsys)
    assert (code, line) == (2, f"x: error: there is no folder {tmp_path}/none\n")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_refused(folder, capsys, name):
    (folder / name).unlink()
    code, line = _refusal(folder, capsys)
    assert code == 1
    assert f"{folder}/{name}: there is no such file" in line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_that_leads_out_is_refused(folder, tmp_path, capsys, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    code, line = _refusal(folder, capsys)
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
    config = _config(folder)
    config["weights"]["file"] = config["file"] = f"{tmp_path}/other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    assert release.load(folder).sizes == (64, 48, 32)


def test_a_flipped_bit_is_refused(folder, capsys):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, line = _refusal(folder, capsys)
    assert code == 1
    assert "model.safetensors: is damaged: its SHA-256 is not that in config.json" in line


def test_a_file_of_another_length_is_refused(folder, capsys):
    path = folder / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 4)
    code, line = _refusal(folder, capsys)
    assert code == 1
    assert f"has {size - 4} bytes, config.json says {size}" in line


def test_a_file_larger_than_its_network_is_not_even_read(folder, capsys, monkeypatch):
    read: list[str] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), real(path))[1])
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size + 2**40)  # takes no disk
    code, line = _refusal(folder, capsys)
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
    _rewrite(folder, damage((folder / "model.safetensors").read_bytes()))
    code, line = _refusal(folder, capsys)
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
    _rewrite(folder, safetensors.torch.save(tensors))
    code, line = _refusal(folder, capsys)
    assert code == 1
    assert "model.safetensors: does not fit the network in config.json: " in line
    assert message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"format": NaN}', "is no JSON (NaN is no number of JSON)"),
        ('{"format": ' + "9" * 5000 + "}", "is no JSON"),
        (b"\xff\xfe\xfd", "is no JSON"),
        ("[]", "it is [], must be an object"),
        ("{}", "is of format None; this version reads 1"),
        ('{"format": 2}', "is of format 2; this version reads 1"),
        ('{"format": 1}', "network is missing"),
        (" " * (2**22 + 1), "has 4194305 bytes, more than the 4194304"),
    ],
)
def test_a_config_that_is_none_is_refused(folder, capsys, text, message):
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "config.json").write_bytes(data)
    code, line = _refusal(folder, capsys)
    assert code == 1
    assert f"{folder}/config.json: " in line
    assert message in line


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"arch": "parallel_os.system"}, 2, "unknown; did you mean|unknown; such a name is"),
        ({"arch": "parallel_timm/hf-hub:x/y"}, 1, "must be a name such as parallel_resnet50"),
        ({"arch": "parallel_timm/../../x", "width_mult": 1.0}, 2, "unknown to timm"),
        ({"arch": "parallel_resnet18\n"}, 1, "must be a name such as parallel_resnet50"),
        ({"arch": "parallel_resnet18"}, 1, "does not fit the network in config.json"),
        ({"sizes": [-64, -96]}, 1, "must be up to 32 integers from 1 to 4096, the largest first"),
        ({"sizes": [32, 48, 64]}, 1, "the largest first"),
        ({"sizes": [64, 48, 48]}, 1, "the largest first"),
        ({"sizes": []}, 1, "the largest first"),
        ({"sizes": [10**9, 48, 32]}, 1, "integers from 1 to 4096"),
        ({"sizes": list(range(132, 99, -1))}, 1, "up to 32 integers"),
        ({"sizes": [64.0, 48.0, 32.0]}, 1, "must be up to 32 integers"),
        ({"sizes": [64, 48]}, 1, "gflops|preprocessing|does not fit"),
        ({"num_classes": 10**9}, 1, "is 1000000000, must be an integer from 1 to 1000000"),
        ({"num_classes": -1}, 1, "must be an integer from 1 to 1000000"),
        ({"num_classes": True}, 1, "must be an integer from 1 to 1000000"),
        ({"num_classes": 2}, 1, "network.classes has 3 names, network.num_classes is 2"),
        ({"width_mult": 1e6}, 1, "must be a number from 0.01 to 16"),
        ({"width_mult": 0.5}, 1, "does not fit the network in config.json"),
        ({"normalize": "none"}, 1, 'must be "imagenet" or "unit"'),
        ({"normalize": "unit"}, 1, "preprocessing is not what this version does"),
        ({"eval_crop_ratio": 0.5}, 1, "must be 0.875"),
        ({"stem": "large"}, 1, 'must be "imagenet" or "small"'),
        ({"classes": [["ant"]] * 3}, 1, "must be a list of names"),
    ],
)
def test_a_description_that_is_not_the_networks_is_refused(folder, capsys, changes, code, message):
    config = _config(folder)
    config["network"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    found, line = _refusal(folder, capsys)
    assert found == code
    assert re.search(message, line)


def test_a_builders_complaint_is_one_line(folder, capsys, monkeypatch):
    def complain(_):
        raise RuntimeError("no such\nshapes")

    monkeypatch.setattr(release, "create_model", complain)
    code, line = _refusal(folder, capsys)
    assert code == 1
    assert "config.json: such a network cannot be built (no such)" in line


def test_a_network_that_its_file_cannot_hold_takes_no_memory(folder, capsys, monkeypatch):
    """Of so many classes it would take 0.5 GB."""
    config = _config(folder)
    config["network"]["num_classes"] = 1_000_000
    (folder / "config.json").write_text(json.dumps(config))
    built: list[bool] = []

    def watched(*args):
        model = create_model(*args)
        built.append(all(p.is_meta for n, p in model.named_parameters() if n != "alpha"))
        return model

    monkeypatch.setattr(release, "create_model", watched)
    code, line = _refusal(folder, capsys)
    assert code == 1
    assert "network.fc.weight is (3, 128), not (1000000, 128)" in line
    assert built == [True, True]  # as it is stored and as it is read


def _fields(value: object, path: tuple = ()):
    """The paths of all fields that a description's reader needs."""
    if isinstance(value, dict) and path not in (("source",), ("versions",)):
        for name, inner in value.items():
            yield (*path, name)
            yield from _fields(inner, (*path, name))


def _parse_changed(config: dict, path: tuple, change) -> None:
    changed = copy.deepcopy(config)
    holder = changed
    for name in path[:-1]:
        holder = holder[name]
    change(holder, path[-1])
    release_config.parse(json.dumps(changed).encode())


def test_every_field_is_needed_and_has_its_type(folder):
    config = _config(folder)
    release_config.parse(json.dumps(config).encode())
    paths = list(_fields(config))
    assert len(paths) > 40
    for path in paths:
        with pytest.raises(DataError, match=path[0] if path != ("format",) else "format"):
            _parse_changed(config, path, lambda holder, name: holder.pop(name))
        for wrong in (-1, float("inf"), float("nan"), [None], 10**30):
            with pytest.raises(DataError):
                _parse_changed(config, path, lambda h, n, wrong=wrong: h.update({n: wrong}))


def test_the_version_is_pyprojects():
    assert PYPROJECT["project"]["version"] == __version__


def test_an_arch_is_never_built_from_a_description_that_is_refused(folder, monkeypatch, capsys):
    config = _config(folder)
    del config["gflops"]
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(release, "create_model", lambda *_: pytest.fail("built"))
    assert "gflops is missing" in _refusal(folder, capsys)[1]


def test_regnet_can_be_built_without_memory():
    """Its builder reads values of tensors, which the meta device does not have."""
    arch = "parallel_regnet_x_400mf"
    network = NETWORK | {"arch": arch, "width_mult": 1.0, "sizes": [128]}
    state = release._without_memory(network).state_dict()
    real = create_model(ModelConfig(arch, 3, [128])).state_dict()
    assert {n: (v.shape, v.dtype) for n, v in state.items()} == {
        n: (v.shape, v.dtype) for n, v in real.items()
    }
    assert sum(v.nbytes for v in state.values() if not v.is_meta) < 2**20

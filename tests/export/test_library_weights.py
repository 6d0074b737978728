"""`rsnet export --format torchvision|timm`: the weights are those of the library's own network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torchvision

from pipelines.utils.errors import UsageError
from rsnet.__main__ import main
from rsnet.export import library_weights
from rsnet.release import package as release
from tests.helpers import releases

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def _export(source: Path, output: Path, *words: str) -> Path:
    assert main(["export", str(source), "--output", str(output), *words]) == 0
    return output


def _assert_same_bits(network: torch.nn.Module, source: Path, size: int) -> None:
    model = release.load(source)
    network.eval()
    for layout in LAYOUTS:
        images = torch.randn(2, 3, size, size).contiguous(memory_format=layout)
        with torch.no_grad():
            expected = model.to(memory_format=layout)(images, size)
            assert torch.equal(network.to(memory_format=layout)(images), expected)


@pytest.mark.parametrize(
    ("arch", "words", "build"),
    [
        (
            "parallel_resnet18", "timm",
            lambda: timm.create_model("resnet18", num_classes=8),
        ),
        (
            "parallel_timm/mobilenetv2_100", "timm",
            lambda: timm.create_model("mobilenetv2_100", num_classes=8),
        ),
        (
            "parallel_googlenet", "torchvision",
            lambda: torchvision.models.googlenet(
                num_classes=8, aux_logits=False, init_weights=False
            ),
        ),
        (
            "parallel_mnasnet0_5", "torchvision",
            lambda: torchvision.models.mnasnet0_5(num_classes=8),
        ),
    ],
    ids=["torchvision to timm", "timm", "GoogLeNet", "layers with versions"],
)  # fmt: skip
@pytest.mark.slow
def test_the_librarys_network_repeats_the_logits_of_a_size(tmp_path, capsys, arch, words, build):
    size = 64 if arch == "parallel_googlenet" else 48
    source = releases.write(tmp_path / "release", arch=arch, width_mult=1.0, sizes=[96, size])
    output = _export(source, tmp_path / "out", "--format", words, "--sizes", str(size))
    assert capsys.readouterr().out.count("logits the same, bit for bit") == 2
    network = build()
    network.load_state_dict(torch.load(output / f"model-{size}.pth", weights_only=True))
    _assert_same_bits(network, source, size)
    there = safetensors.torch.load_file(output / f"model-{size}.safetensors")
    assert all(torch.equal(there[k], v) for k, v in network.state_dict().items())
    assert there.keys() == network.state_dict().keys()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("library") / "release"
    return releases.write(
        folder, arch="parallel_mobilenetv2", width_mult=0.35, sizes=[32], normalize="inception"
    )


@pytest.fixture(scope="module")
def exported(source) -> Path:
    return _export(source, source.parent / "out", "--format", "torchvision", "--sizes", "32")


def test_torchvisions_network_of_another_width_repeats_the_logits(source, exported):
    about = json.loads((exported / "model-32.json").read_text())
    assert about["architecture"] == "mobilenet_v2"
    network = torchvision.models.get_model("mobilenet_v2", weights=None, **about["arguments"])
    network.load_state_dict(safetensors.torch.load_file(exported / "model-32.safetensors"))
    _assert_same_bits(network, source, 32)


def test_the_files_say_how_an_image_is_prepared(exported):
    about = json.loads((exported / "model-32.json").read_text())
    expected = {
        "size": 32, "resize_size": 36, "crop_size": 32, "crop_pct": 0.875, "mean": [0.5] * 3,
        "std": [0.5] * 3, "interpolation": "bilinear", "antialias": True, "library": "torchvision",
        "classes": releases.CLASSES,
    }  # fmt: skip
    assert {key: about[key] for key in expected} == expected
    with safetensors.safe_open(exported / "model-32.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("format") == "pt"
    assert metadata["library"] == "torchvision"
    assert json.loads(metadata["mean"]) == [0.5] * 3
    assert metadata.keys() == about.keys()
    files = json.loads((exported / "export.json").read_text())["files"]
    assert [f["file"] for f in files] == ["model-32.safetensors", "model-32.pth"]
    assert {e for f in files for e in f["max_abs_error"]["32"].values()} == {0.0}


@pytest.mark.parametrize(
    ("network", "library", "message"),
    [
        ({"qw": 2, "width_mult": 1.0, "arch": "parallel_resnet18"}, "torchvision",
         "it is quantized (--qw 2 --qa 32); --format onnx has it"),
        ({"mode": "preact"}, "torchvision", "it was trained with --mode preact; --format onnx"),
        ({"stem": "small"}, "timm", "it was trained with --stem small; --format onnx"),
        ({"blurpool": True}, "torchvision", "it was trained with --blurpool; --format onnx"),
        ({"tf_padding": True}, "timm", "it was trained with --tf-padding; --format onnx"),
        ({}, "torchvision", "parallel_resnet10 --width-mult 0.25; --format onnx has it"),
        ({"width_mult": 1.0}, "torchvision", "parallel_resnet10; --format onnx has it"),
        ({"width_mult": 1.0}, "timm", "parallel_resnet10; --format onnx has it"),
        ({"arch": "parallel_shufflenet_v2_x0_5", "width_mult": 1.0}, "timm",
         "parallel_shufflenet_v2_x0_5; --format torchvision has it"),
        ({"arch": "parallel_timm/mobilenetv2_050", "width_mult": 1.0}, "torchvision",
         "parallel_timm/mobilenetv2_050; --format timm has it"),
    ],
)  # fmt: skip
def test_a_network_that_no_library_has_is_refused(network, library, message):
    with pytest.raises(UsageError) as caught:
        library_weights.describe(library, {"network": releases.NETWORK | network})
    expected = f"--format {library}: {library} has no such network: {message}"
    assert str(caught.value).startswith(expected)


def test_a_refused_network_is_one_line_and_leaves_nothing(tmp_path, capsys):
    source = releases.write(tmp_path / "release", sizes=[32])
    words = ["export", str(source), "--format", "torchvision", "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


@pytest.mark.slow
def test_a_network_of_the_same_name_with_other_layers_is_refused(tmp_path, capsys):
    source = releases.write(
        tmp_path / "release", arch="parallel_efficientnet_b0", width_mult=1.0, sizes=[32]
    )
    words = ["export", str(source), "--format", "timm", "--output", str(tmp_path / "out")]
    assert main(words) == 1
    err = capsys.readouterr().err
    assert "timm's efficientnet_b0 has other layers than parallel_efficientnet_b0" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_without_timm_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    network = releases.NETWORK | {"arch": "parallel_resnet18", "width_mult": 1.0}
    with pytest.raises(
        UsageError, match=r'timm is not installed: pip install "rsnet-trainer\[timm'
    ):
        library_weights.describe("timm", {"network": network})

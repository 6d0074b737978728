"""Ordinary networks' weights as the start of switchable ones."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from pipelines.normalize import MEAN_STD, PixelNormalizer
from pipelines.utils.errors import DataError, UsageError
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model, pretrained_normalize
from rsnet.models.pretrained import expected_normalize, is_path, load_pretrained
from rsnet.models.resnet import scaled_resnet

SIZES = (48, 32)


class _Own:
    """An object that a trainer may have put beside its weights."""


def _network(num_classes=7):
    return scaled_resnet("resnet10", num_classes, width_mult=0.125)


def _load(weights, num_classes=7):
    config = ModelConfig("parallel_resnet10", num_classes, SIZES, width_mult=0.125)
    return create_model(config, pretrained=str(weights))


def _trained(network):
    """BatchNorm as after training, so that a copy can be told from a fresh one."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.mark.parametrize(
    ("arch", "make"),
    [
        ("parallel_resnet18", lambda: torchvision.models.resnet18(num_classes=7)),
        ("parallel_mobilenetv2", lambda: torchvision.models.mobilenet_v2(num_classes=7)),
        ("parallel_timm/resnet10t", lambda: timm.create_model("resnet10t", num_classes=7)),
    ],
)
def test_every_resolution_starts_as_the_ordinary_network(tmp_path, arch, make):
    plain = _trained(make())
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = create_model(ModelConfig(arch, 7, SIZES), pretrained=str(tmp_path / "plain.pth")).eval()
    for size in SIZES:
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


def _published(name: str, network) -> dict:
    """The state dict as torchvision publishes it."""
    state = network.state_dict()
    if "densenet" in name:  # torchvision renames these when it loads them
        pattern = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])\.")
        old = {pattern.sub(r"\1.\2.", key): value for key, value in state.items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in old
        return old
    return state


@torch.no_grad()
def _require_the_librarys_logits(arch, plain, state, mean, std, tmp_path):
    """Of the same bytes, each with its own normalisation."""
    torch.save(state, tmp_path / "published.pth")
    weights = str(tmp_path / "published.pth")
    normalize = pretrained_normalize(arch, weights)
    assert normalize is not None
    model = create_model(ModelConfig(arch, 10, (96,)), pretrained=weights).eval()
    pixels = torch.randint(256, (2, 96, 96, 3), dtype=torch.uint8)
    ours = PixelNormalizer(torch.device("cpu"), torch.float32, normalize)(pixels)
    own_mean, own_std = (torch.tensor(v, dtype=torch.float64) for v in MEAN_STD[normalize])
    exact = (pixels - own_mean) / own_std
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    # In float64: networks that nobody trained make of float32's rounding up to a tenth of the logits.
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    expected = plain.double()((pixels.double().permute(0, 3, 1, 2) / 255 - mean) / std)
    found = model.double()(exact.permute(0, 3, 1, 2))
    # Another normalisation makes 5e-2 or more.
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-3


def _settled(network):
    """BatchNorm with the statistics of noise, so that logits neither vanish nor overflow."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1, 0.1)
            module.momentum = None
    network.train()
    with torch.no_grad():
        network(torch.randn(4, 3, 96, 96))
    return network.eval()


TORCHVISION = [
    "densenet121", "googlenet", "inception_v3", "mnasnet0_5", "efficientnet_b0", "efficientnet_v2_s",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "wide_resnet50_2",
    "shufflenet_v2_x0_5", "vgg11_bn",
]  # fmt: skip
FAST = ["mnasnet0_5", "shufflenet_v2_x0_5"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in TORCHVISION]
)
def test_logits_are_torchvisions_of_its_published_files(tmp_path, name):
    with_weights = {}
    if name in ("googlenet", "inception_v3"):  # so torchvision builds them where there are weights
        with_weights = {"transform_input": True, "aux_logits": False, "init_weights": False}
    plain = _settled(torchvision.models.get_model(name, num_classes=10, **with_weights))
    arch = "parallel_mobilenetv2" if name == "mobilenet_v2" else f"parallel_{name}"
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    _require_the_librarys_logits(arch, plain, _published(name, plain), *imagenet, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_small_050",
        *(pytest.param(n, marks=pytest.mark.slow) for n in (
            "inception_v3", "tf_efficientnet_b0", "dpn48b", "regnety_002", "repvgg_a0", "resnet18",
            "mobilenetv4_conv_small", "fastvit_t8", "ghostnet_050", "hrnet_w18_small", "densenet121",
        )),
    ],
)  # fmt: skip
def test_logits_are_timms_of_its_files(tmp_path, name):
    plain = _settled(timm.create_model(name, num_classes=10))
    config = timm.models.get_pretrained_cfg(name) or Namespace(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    state = plain.state_dict()
    arch = f"parallel_timm/{name}"
    _require_the_librarys_logits(arch, plain, state, config.mean, config.std, tmp_path)


@pytest.mark.parametrize(
    ("arch", "weights", "normalize"),
    [
        ("parallel_resnet18", "default", "imagenet"),
        ("parallel_googlenet", "IMAGENET1K_V1", "inception"),
        ("parallel_timm/resnet50_clip.openai", "default", "clip"),
        ("parallel_timm/dpn68", "mx_in1k", "dpn"),
        ("parallel_timm/tf_efficientnetv2_s", "in21k", "inception"),
        ("parallel_timm/tf_efficientnet_b0", "ns_jft_in1k", "imagenet"),
        ("parallel_timm/mobilevit_s", "cvnets_in1k", "unit"),
        ("parallel_resnet19", "default", None),
    ],
)
def test_weights_know_how_their_images_are_normalised(arch, weights, normalize):
    assert pretrained_normalize(arch, weights) == normalize


def test_names_of_older_densenets_and_versions_of_layers_are_read(tmp_path):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.denselayer1 = torch.nn.ModuleDict({"norm1": torch.nn.BatchNorm2d(2)})

        def _load_from_state_dict(self, state, prefix, metadata, *rest):
            assert "version" in metadata
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    old = {f"module.denselayer1.norm.1.{k}": torch.full((2,), 3.0) for k in
           ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
    torch.save(old, tmp_path / "old.pth")
    network = Network()
    assert load_pretrained(network, "torchvision", "it", str(tmp_path / "old.pth"), set) == ""
    assert network.denselayer1["norm1"].running_var.tolist() == [3, 3]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s},
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": {}, "state_dict_ema": s},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        # torchvision's references: options beside the weights, torch's AveragedModel
        lambda s: {
            "args": Namespace(lr=0.5),
            "model_ema": {f"module.{k}": v for k, v in s.items()} | {"n_averaged": torch.tensor(9)},
        },
        lambda s: {**s, 7: torch.zeros(1), "epoch": 3},
    ],
)
def test_files_of_known_trainers_are_read(tmp_path, wrap):
    plain = _trained(_network())
    torch.save(wrap(plain.state_dict()), tmp_path / "plain.pth")
    model = _load(tmp_path / "plain.pth")
    assert torch.equal(model.network.conv1.weight, plain.conv1.weight)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("googlenet", {"init_weights": False}),
        pytest.param("inception_v3", {"init_weights": False}, marks=pytest.mark.slow),
    ],
)
def test_classifiers_on_the_side_are_left_out(tmp_path, name, options):
    plain = torchvision.models.get_model(name, num_classes=3, **options)
    assert any("aux" in key.lower() for key in plain.state_dict())
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = create_model(
        ModelConfig(f"parallel_{name}", 3, (96,)), pretrained=str(tmp_path / "plain.pth")
    )
    assert torch.equal(model.network.fc.weight, plain.fc.weight)


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    plain = _trained(_network())
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    model = _load(tmp_path / "plain.safetensors")
    assert torch.equal(model.network.conv1.weight, plain.conv1.weight)


def test_a_classifier_of_other_classes_starts_anew(tmp_path):
    plain = _network()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = _load(tmp_path / "plain.pth", num_classes=4)
    assert model.network.fc.weight.shape == (4, 64)
    assert torch.equal(model.network.layer4[0].conv1.weight, plain.layer4[0].conv1.weight)


def test_what_does_not_fit_is_listed_by_name_and_shape(tmp_path):
    state = _network().state_dict()
    state["conv1.weight"] = torch.zeros(8, 3, 3, 3)
    del state["bn1.weight"]
    torch.save(state, tmp_path / "plain.pth")
    with pytest.raises(DataError) as error:
        _load(tmp_path / "plain.pth")
    assert "bn1.weight (8,) is missing" in str(error.value)
    assert "conv1.weight is (8, 3, 3, 3), not (8, 3, 7, 7)" in str(error.value)


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"--pretrained: there is no file .*/none\.pth"):
        _load(tmp_path / "none.pth")
    with pytest.raises(UsageError, match="torchvision's resnet18 has IMAGENET1K_V1"):
        create_model(ModelConfig("parallel_resnet18", 7, SIZES), pretrained="IMAGENET21K")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"page\.pth has no readable weights") as error:
        _load(tmp_path / "page.pth")
    assert str(error.value).endswith("no file of tensors and plain values that torch.save wrote")
    torch.save({"model": _Own()}, tmp_path / "own.pth")
    with pytest.raises(DataError, match=r"it holds code: \S*_Own$"):
        _load(tmp_path / "own.pth")


@pytest.mark.parametrize("tag", ["a9_in1k", "nonsense"])
def test_a_tag_that_timm_does_not_have_is_one_line_with_those_it_has(tag):
    with pytest.raises(
        UsageError, match=rf"--pretrained: timm has no weights resnet18\.{tag} .*a1_in1k"
    ):
        expected_normalize("timm", "resnet18", tag)
    with pytest.raises(
        UsageError, match=rf"--arch parallel_timm/resnet18\.{tag}: .*; timm has .*a1_in1k"
    ):
        create_model(ModelConfig(f"parallel_timm/resnet18.{tag}", 3, (32,)))


def test_a_file_of_any_suffix_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pytorch_model.bin", "default"):
        Path(name).touch()
    assert is_path("pytorch_model.bin")
    assert not is_path("default")

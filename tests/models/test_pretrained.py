"""Ordinary networks' weights as the start of switchable ones."""

from __future__ import annotations

from argparse import Namespace

import pytest
import timm
import torch
import torchvision

from pipelines.utils.errors import DataError, UsageError
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
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
    [("googlenet", {"init_weights": False}), ("inception_v3", {"init_weights": False})],
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
    assert "\n" not in str(error.value)
    torch.save({"model": _Own()}, tmp_path / "own.pth")
    with pytest.raises(DataError, match=r"it holds code: \S*_Own$"):
        _load(tmp_path / "own.pth")

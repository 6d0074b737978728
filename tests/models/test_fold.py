"""One size's network with BatchNorm folded: the same logits, and the switchable network as it was."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torchvision.models import DenseNet

from pipelines.utils.errors import UsageError
from rsnet.config.model_config import ModelConfig
from rsnet.inference.runner import ModelRunner
from rsnet.models.factory import create_model
from rsnet.models.fold import fold_batchnorm, plain
from rsnet.models.switchable import ResolutionSwitchable, SwitchableBatchNorm2d
from rsnet.release import package as release
from tests.helpers import releases

# What is left after folding: norms that follow a sum, a concatenation or an activation.
NETWORKS = {
    "parallel_resnet10": ({"width_mult": 0.25}, 0),
    "parallel_resnet10 blurred": ({"width_mult": 0.25, "blurpool": True}, 0),
    "parallel_resnet10 padded as by TensorFlow": ({"width_mult": 0.25, "tf_padding": True}, 0),
    "parallel_resnet10 with one BatchNorm for all": ({"width_mult": 0.25, "norm": "shared"}, 0),
    "parallel_resnet10 pre-activated": ({"width_mult": 0.25, "mode": "preact"}, 4),
    "parallel_resnet10 quantized": ({"width_mult": 0.25, "qw": 2}, 11),
    "parallel_mobilenetv2": ({"width_mult": 0.25}, 0),
    "parallel_shufflenet_v2_x0_5": ({}, 0),
    "a small DenseNet": ({}, 4 + 1 + 1),
    "parallel_timm/resnetv2_18": ({}, 9),
}


def _make(name: str):
    """A network in which no two BatchNorms are alike; at the smallest size strided layers see one pixel."""
    options, _ = NETWORKS[name]
    if name == "a small DenseNet":  # two blocks of two layers
        model = ResolutionSwitchable(DenseNet(8, (2, 2), 16, num_classes=5), (32, 16)).eval()
    else:
        model = create_model(ModelConfig(name.split()[0], 5, (32, 16), **options)).eval()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                value.uniform_(0.5, 1.5)
            norm.bias.sub_(1)
            norm.running_mean.sub_(1)
            norm.weight.mul_(2)  # else little of the image is left in the logits
    return model


def _norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_gives_the_logits_of_its_size(name):
    model = _make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for size in model.sizes:
        x = torch.randn(2, 3, size, size)
        network = fold_batchnorm(model, size)
        with torch.no_grad():
            logits, expected = network(x), model(x, size)
        assert (logits - expected).abs().max() < 3e-6 * expected.abs().max()
        assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
        assert len(_norms(network)) == NETWORKS[name][1]
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_plain_network_has_the_models_own_tensors_and_bits():
    model = _make("parallel_resnet10")
    for size in model.sizes:
        network = plain(model, size)
        x = torch.randn(2, 3, size, size)
        assert torch.equal(network(x), model(x, size))
        assert not any(isinstance(m, SwitchableBatchNorm2d) for m in network.modules())
        theirs = {t.data_ptr() for t in model.parameters()}
        assert {p.data_ptr() for p in network.parameters()} <= theirs


class _Odd(nn.Module):
    """A convolution and a BatchNorm that must not be made one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.same = self.conv if kind == "shared convolution" else None

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "output used twice":
            return (self.bn(y) + y).mean((2, 3))
        if self.kind == "activation between":
            return self.bn(y.relu()).mean((2, 3))
        if self.kind == "shared convolution":
            return (self.bn(y) + self.same(x + 1)).mean((2, 3))
        if self.kind == "shared norm":
            return (self.bn(y) + self.bn(x)).mean((2, 3))
        return self.bn(nn.functional.conv2d(x, 2 * self.conv.weight)).mean((2, 3))


@pytest.mark.parametrize(
    "kind",
    [
        "output used twice",
        "activation between",
        "shared convolution",
        "shared norm",
        "other weight",
    ],
)
def test_what_is_not_a_convolution_followed_by_its_own_norm_stays(kind):
    model = ResolutionSwitchable(_Odd(kind), (8, 4)).eval()
    for norm in _norms(model):
        norm.running_mean.uniform_()
        norm.running_var.uniform_(0.5, 1.5)
    network = fold_batchnorm(model, 8)
    x = torch.randn(2, 3, 8, 8)
    assert len(_norms(network)) == 1
    assert torch.equal(network(x), model(x, 8))


def test_a_norm_under_two_names_is_applied_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), self.bn)

        def forward(self, x):
            return self.body(x).mean((2, 3))

    model = ResolutionSwitchable(Twice(), (8,)).eval()
    for norm in _norms(model):
        norm.weight.data.uniform_(2, 3)
    network = fold_batchnorm(model, 8)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(network(x), model(x))
    assert not _norms(network)


def test_a_folded_networks_depthwise_convolutions_keep_their_new_bias_under_autocast():
    model = _make("parallel_mobilenetv2")
    network, x = fold_batchnorm(model, 32), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        with_graph = network(x)
        with torch.no_grad():
            assert torch.equal(with_graph, network(x))


def test_quantized_activations_are_not_folded():
    model = create_model(
        ModelConfig("parallel_resnet10", 5, (32,), width_mult=0.25, mode="preact", qw=2, qa=2)
    )
    with pytest.raises(UsageError, match="activations are quantized, and rounding would move some"):
        fold_batchnorm(model.eval(), 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return release.load(releases.write(tmp_path_factory.mktemp("fold") / "release"))


CPU = torch.device("cpu")


@torch.inference_mode()
def test_each_size_is_folded_when_it_is_first_computed(model):
    forward = ModelRunner(model, CPU, None, batch_size=4, fold=True, cuda_graphs=False)
    assert not forward._folded
    for size in (48, 64, 48):
        x = torch.randn(3, 3, size, size)
        torch.testing.assert_close(forward(x, size), model(x, size))
    assert list(forward._folded) == [48, 64]
    assert not any(_norms(network) for network in forward._folded.values())


@torch.inference_mode()
def test_folded_weights_are_rounded_to_bfloat16_once(model):
    forward = ModelRunner(model, CPU, torch.bfloat16, batch_size=4, fold=True, cuda_graphs=False)
    x = torch.randn(3, 3, 48, 48)
    logits = forward(x.bfloat16(), 48)
    with torch.autocast("cpu", torch.bfloat16):
        expected = fold_batchnorm(model, 48)(x)
    assert torch.equal(logits, expected)
    assert {p.dtype for p in forward._folded[48].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": False, "cuda_graphs": True}, "cuda_graphs: there are none on cpu"),
        ({"fold": True, "cuda_graphs": False}, "fold: this network's activations are quantized"),
    ],
)
def test_what_a_network_or_device_cannot_is_refused_at_the_start(options, message):
    model = create_model(
        ModelConfig("parallel_resnet10", 5, (32,), width_mult=0.25, mode="preact", qw=2, qa=2)
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        ModelRunner(model.eval(), CPU, None, batch_size=4, **options)


def test_cudnn_is_not_timed_for_the_forward_that_finds_the_convolutions(monkeypatch):
    model = create_model(ModelConfig("parallel_resnet10", 3, (32,), width_mult=0.125))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []
    model.network.conv1.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.benchmark)
    )
    fold_batchnorm(model.eval(), 32)
    assert seen == [False]
    assert torch.backends.cudnn.benchmark

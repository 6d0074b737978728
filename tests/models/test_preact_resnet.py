"""The pre-activation ResNets do what the authors' quantized training code does, in its order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.models.preact_resnet import Block, PooledShortcut, PreActResNet
from rsnet.models.quantization.lq_nets import ActivationQuantizer, quantize, quantized_layers

# Of RS-Nets' authors: what happens to a block's input, and to its shortcut.
HALF = ["conv 3x3", "bn", "relu", "quantize", "conv 3x3", "bn"]
FULL = [
    "conv 1x1",
    "bn",
    "relu",
    "quantize",
    "conv 3x3",
    "bn",
    "relu",
    "quantize",
    "conv 1x1",
    "bn",
]
OWN = ["bn", "relu", "quantize"]
PROJECTED, POOLED = ["conv 1x1", "bn"], ["pool"]
# (arch, shortcut): first blocks of stages 1, 2, 3; a later block; the ends of stages 1 and 4.
ORDER: dict[Any, list[tuple[list[str], list[str]]]] = {
    ("resnet18", "B"): [(["quantize", *HALF], []), (HALF, PROJECTED), (HALF, PROJECTED)],
    ("resnet50", "B"): [(["quantize", *FULL], PROJECTED), (FULL, PROJECTED), (FULL, PROJECTED)],
    ("resnet18", "A"): [(["quantize", *HALF], []), (["quantize", *HALF], POOLED)],
    ("resnet50", "A"): [(["quantize", *FULL], POOLED), (["quantize", *FULL], POOLED)],
}


def _operations(module: nn.Module, x: Tensor) -> list[str]:
    """What a module does to `x`, in the order in which it does it."""
    done = []

    def note(m: nn.Module, *_: Any) -> None:
        if isinstance(m, nn.Conv2d):
            done.append(f"conv {m.kernel_size[0]}x{m.kernel_size[1]}")
        else:
            names = {nn.BatchNorm2d: "bn", nn.ReLU: "relu", ActivationQuantizer: "quantize"}
            done.append({**names, PooledShortcut: "pool"}[type(m)])

    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, ActivationQuantizer, PooledShortcut)
    hooks = [m.register_forward_hook(note) for m in module.modules() if isinstance(m, kinds)]
    module(x)
    for hook in hooks:
        hook.remove()
    return done


def _channels(block: Block) -> int:
    return next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(("name", "shortcut"), ORDER)
def test_blocks_do_their_operations_in_the_originals_order(name, shortcut):
    network = quantize(PreActResNet(name, 10, shortcut, 0.25), 2, 2).eval()
    inner = FULL if name == "resnet50" else HALF
    for stage, (residual, projection) in enumerate(ORDER[name, shortcut], start=1):
        first, second = network.get_submodule(f"layer{stage}")[:2]
        x = torch.rand(1, _channels(first), 8, 8)
        assert _operations(first, x) == residual + projection
        x = torch.rand(1, _channels(second), 8, 8)
        assert _operations(second, x) == OWN + inner
        end = network.get_submodule(f"layer{stage}").last
        quantized = ["quantize"] if shortcut == "B" else []
        assert _operations(end, torch.rand(1, end.bn.num_features, 4, 4)) == [
            "bn",
            "relu",
            *quantized,
        ]
    last = network.layer4.last
    assert _operations(last, torch.rand(1, last.bn.num_features, 4, 4)) == ["bn", "relu"]


def _plain_network(network: PreActResNet, x: Tensor, shortcut: str) -> Tensor:
    """The same, written from the original's description, on the network's layers."""

    def quantized(module: nn.Module, x: Tensor) -> Tensor:
        basis = module.basis[0]
        levels = sorted([0.0, basis[0].item(), basis[1].item(), basis.sum().item()])
        y = torch.zeros_like(x)
        for low, high in itertools.pairwise(levels):
            y = torch.where(x > (low + high) / 2, high, y)
        return y

    def normalized(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
        scale = (bn.weight / (bn.running_var + 1e-5).sqrt())[:, None, None]
        return (x - bn.running_mean[:, None, None]) * scale + bn.bias[:, None, None]

    x = F.conv2d(x, network.conv1.weight, stride=2, padding=3)
    x = F.max_pool2d(normalized(network.bn1, x).relu(), 3, 2, 1)
    for group in range(4):
        stage = network.get_submodule(f"layer{group + 1}")
        *blocks, end = stage
        for i, block in enumerate(blocks):
            stride = 2 if i == 0 < group else 1
            way = x
            if i > 0:
                x = quantized(block.before.quant, normalized(block.before.bn, x).relu())
            elif group == 0 or shortcut == "A":
                x = quantized(block.before, x)
            convs = [m for m in block.residual if isinstance(m, nn.Conv2d)]
            for j, conv in enumerate(convs):
                strided = j == (1 if len(convs) == 3 else 0)
                x = F.conv2d(
                    x,
                    conv.weight,
                    stride=stride if strided else 1,
                    padding=conv.weight.shape[2] // 2,
                )
                if j + 1 < len(convs):
                    act = block.residual.get_submodule(f"act{j + 1}")
                    x = quantized(act.quant, normalized(act.bn, x).relu())
            x = normalized(block.residual.bn, x)
            if way.shape != x.shape and shortcut == "B":
                conv, bn = block.shortcut
                way = normalized(bn, F.conv2d(way, conv.weight, stride=stride))
            elif way.shape != x.shape:
                pooled = F.avg_pool2d(way, stride, stride)
                way = torch.zeros_like(x)
                way[:, : pooled.shape[1]] = pooled
            x = x + way
        x = normalized(end.bn, x).relu()
        if shortcut == "B" and group < 3:
            x = quantized(end.quant, x)
    return F.linear(x.mean((2, 3)), network.fc.weight, network.fc.bias)


@pytest.mark.parametrize("width_mult", [0.25, 0.03125])  # the latter: 8, 8, 8 and 16 channels
@pytest.mark.parametrize(("name", "shortcut"), ORDER)
def test_logits_are_those_of_a_plain_description(name, shortcut, width_mult):
    network = quantize(PreActResNet(name, 10, shortcut, width_mult), 2, 2).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        torch.testing.assert_close(network(x), _plain_network(network, x, shortcut))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet18", 8),
        ("resnet34", 16),
        ("resnet50", 16),
        pytest.param("resnet101", 33, marks=pytest.mark.slow),
        pytest.param("resnet152", 50, marks=pytest.mark.slow),
    ],
)
def test_every_convolution_but_the_first_is_quantized_and_sees_a_quantized_input(name, blocks):
    with torch.device("meta"):
        network = quantize(PreActResNet(name, 10), 2, 2)
    bottleneck = name not in ("resnet18", "resnet34")
    shortcuts = 4 if bottleneck else 3
    assert len(quantized_layers(network)) == blocks * (3 if bottleneck else 2) + shortcuts
    quantizers = sum(isinstance(m, ActivationQuantizer) for m in network.modules())
    assert quantizers == blocks * (3 if bottleneck else 2)


def _filters(network: nn.Module) -> int:
    return sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d))


def test_it_has_the_filters_of_torchvisions_resnet18_and_no_zero_gamma():
    small = PreActResNet("resnet18", 10, width_mult=0.125)
    gammas = [m.weight for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((g == 1).all() for g in gammas)
    with torch.device("meta"):
        assert _filters(PreActResNet("resnet18", 1000)) == _filters(resnet18())


def test_shortcut_a_pools_odd_sizes_as_the_convolutions_do():
    x = torch.rand(1, 2, 5, 5)
    y = PooledShortcut(2, 3)(x)
    assert y.shape == (1, 5, 3, 3)
    assert torch.equal(y[0, :2, 2, 2], x[0, :, 4, 4])
    assert (y[0, 2:] == 0).all()


@pytest.mark.parametrize("options", [{"mode": "preact"}, {"qw": 2}])
def test_the_classifier_starts_as_tensorpacks(options):
    """FullyConnected's variance_scaling_initializer(2.0): N(0, 2 / inputs), and no bias."""
    fc = create_model(ModelConfig("parallel_resnet18", 1000, (32,), **options)).network.fc
    assert fc.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.01)
    assert not fc.bias.any()

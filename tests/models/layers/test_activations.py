"""Activations that are not copied: torch's numbers, in less memory traffic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.models.layers.activations import convert_activations
from tests.helpers.operations import Operations

KINDS = [nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish]


def _run(layer, x):
    leaf = x.clone().requires_grad_()
    y = layer(leaf * 1)
    y.backward(torch.arange(1, y.numel() + 1).view_as(y).to(y.dtype))
    return y.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_torchs(kind, inplace, dtype):
    special = [0.0, -0.0, 6.0, -3.0, 3.0, torch.nan, torch.inf, -torch.inf, 5.999, 6.001, 1e-30]
    x = torch.cat([torch.tensor(special), 8 * torch.randn(53)]).to(dtype)
    ours = nn.Sequential(kind(inplace=inplace))
    convert_activations(ours)
    assert type(ours[0]) is not kind
    for found, expected in zip(_run(ours, x), _run(kind(inplace=inplace), x), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("kind", KINDS)
def test_training_copies_no_input_and_inference_stays_in_place(kind):
    layer = nn.Sequential(kind(inplace=True))
    convert_activations(layer)
    x = torch.randn(4, requires_grad=True) * 1
    with Operations() as operations:
        layer(x).sum().backward()
    assert operations.count["clone"] == 0
    z = torch.randn(4)
    with torch.no_grad():
        assert layer(z).data_ptr() == z.data_ptr()


def test_relu6_keeps_its_output_alone():
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    layer = nn.Sequential(nn.ReLU6(inplace=True))
    convert_activations(layer)
    x = torch.randn(4, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]


@pytest.mark.parametrize("arch", ["mobilenetv2", "efficientnet_b0", "mobilenet_v3_small"])
def test_a_network_trains_to_the_same_bits(arch):
    torch.manual_seed(0)
    ours = create_model(ModelConfig(f"parallel_{arch}", 3, (32,)))
    library = copy.deepcopy(ours)
    for module in library.modules():
        if type(module).__module__ == "rsnet.models.layers.activations":
            module.__class__ = next(k for k in KINDS if isinstance(module, k))
    x = torch.randn(4, 3, 32, 32)
    in_place = sum(isinstance(m, tuple(KINDS)) and m.inplace for m in library.modules())
    gradients, clones = [], []
    for model in (ours, library):
        torch.manual_seed(1)  # dropout
        with Operations() as operations:
            model.train()(x).square().sum().backward()
        gradients.append([p.grad for p in model.network.parameters()])
        clones.append(operations.count["clone"])
    assert clones[1] - clones[0] == in_place > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

"""Strided 1 x 1 convolutions of few channels: the same numbers, and no crash."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.models.layers.onednn_workarounds import SkippingConv2d, convert_pointwise_convs


@pytest.mark.parametrize(("pixels", "stride"), [(48, 2), (7, 2), (8, (2, 3)), (1, 2)])
def test_it_gives_what_a_plain_convolution_gives(pixels, stride):
    plain = nn.Sequential(nn.Conv2d(8, 24, 1, stride=stride)).double()
    skipping = copy.deepcopy(plain)
    convert_pointwise_convs(skipping)
    assert type(skipping[0]) is SkippingConv2d
    x = torch.randn(3, 8, pixels, pixels, dtype=torch.double)
    results = []
    for layer in (plain, skipping):
        y = layer(x)
        y.square().sum().backward()
        results.append((y, *(p.grad for p in layer.parameters())))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_network_of_eight_channels_trains_in_float32():
    """Crashes, or has wrong gradients, with plain convolutions on a CPU with AVX-512 (oneDNN)."""
    torch.manual_seed(0)
    model = create_model(
        ModelConfig("parallel_resnet10", 3, [48, 24], width_mult=0.125, stem="small")
    )
    exact = copy.deepcopy(model).double()
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 48, 48).to(memory_format=torch.channels_last)
    for network, images in ((model, x), (exact, x.double())):
        network(images).square().sum().backward()
    for name in ("layer2", "layer3", "layer4"):
        found, expected = (
            getattr(m.network, name)[0].downsample[0].weight.grad for m in (model, exact)
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_other_convolutions_stay_as_they_are():
    layers = nn.Sequential(
        nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 8, 1)
    )
    convert_pointwise_convs(layers)
    assert {type(layer) for layer in layers} == {nn.Conv2d}

"""SAME padding against numbers of TensorFlow 2.21's tf.nn.conv2d and tf.nn.max_pool2d, and blur pooling."""

from __future__ import annotations

import copy
import dataclasses
import operator

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.models.layers.conv import convert_to_blurpool, convert_to_same_padding

# {(size, kernel): output}: of 0, 1, 2, ... row by row, with a filter of 0, 1, 2, ..., at stride 2.
CONVOLVED = {
    (4, 3): [[258, 186], [187, 113]],
    (4, 7): [[3940, 3700], [2260, 2020]],
    (5, 3): [[88, 175, 136], [345, 528, 345], [232, 319, 184]],
    (5, 7): [[5904, 7470, 6000], [7290, 9000, 7050], [4080, 4830, 3600]],
}
# Of -1, -2, -3, ..., 3x3 at stride 2.
POOLED = {
    4: [[-1, -3], [-9, -11]],
    5: [[-1, -2, -4], [-6, -7, -9], [-16, -17, -19]],
}


def _count(size: int) -> torch.Tensor:
    return torch.arange(size**2, dtype=torch.float32).reshape(1, 1, size, size)


@pytest.mark.parametrize(("size", "kernel"), CONVOLVED)
def test_a_strided_convolution_is_tensorflows(size, kernel):
    conv = nn.Conv2d(1, 1, kernel, stride=2, padding=kernel // 2, bias=False)
    conv.weight.data = _count(kernel)
    convert_to_same_padding(network := nn.Sequential(conv))
    assert network(_count(size))[0, 0].tolist() == CONVOLVED[size, kernel]


def _one_dimensional(values: list[float], kernel: list[float]) -> list[float]:
    """At stride 2, as TensorFlow documents SAME: the smaller half of the padding comes first."""
    outputs = -(-len(values) // 2)
    padding = max((outputs - 1) * 2 + len(kernel) - len(values), 0)
    padded = [0.0] * (padding // 2) + values + [0.0] * (padding - padding // 2)
    return [sum(map(operator.mul, kernel, padded[2 * i :])) for i in range(outputs)]


@pytest.mark.parametrize(("height", "width"), [(4, 5), (5, 4), (2, 7)])
def test_height_and_width_are_padded_each_by_its_own_length(height, width):
    """An image and a filter that are outer products convolve to the outer product of rows and columns."""
    column, row = torch.arange(1.0, height + 1), torch.arange(1.0, width + 1)
    down, across = torch.tensor([1.0, 2, 4]), torch.tensor([1.0, 3, 9])
    conv = nn.Conv2d(1, 1, 3, stride=2, padding=1, bias=False)
    conv.weight.data = torch.outer(down, across)[None, None]
    convert_to_same_padding(network := nn.Sequential(conv))
    expected = torch.outer(
        torch.tensor(_one_dimensional(column.tolist(), down.tolist())),
        torch.tensor(_one_dimensional(row.tolist(), across.tolist())),
    )
    assert torch.equal(network(torch.outer(column, row)[None, None])[0, 0], expected)


@pytest.mark.parametrize("size", POOLED)
def test_a_max_pooling_is_tensorflows(size):
    convert_to_same_padding(network := nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1)))
    assert network(-1 - _count(size))[0, 0].tolist() == POOLED[size]


def test_what_has_no_stride_or_no_padding_stays_as_it_is():
    """Without a stride PyTorch's padding is the same; timm's Conv2dSame has none, and pads by itself."""
    layers = [nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1, 2), nn.Conv2d(1, 1, 3, 2)]
    pools = [nn.MaxPool2d(1), nn.MaxPool2d(3, 2)]
    convert_to_same_padding(nn.Sequential(*layers, *pools))
    assert {type(layer) for layer in layers} == {nn.Conv2d}
    assert {type(pool) for pool in pools} == {nn.MaxPool2d}


def test_blurpool_blurs_before_every_strided_convolution_but_the_first():
    config = ModelConfig("parallel_resnet10", 10, (64,), width_mult=0.25)
    plain = create_model(config).eval()
    blurred = create_model(dataclasses.replace(config, blurpool=True)).eval()
    assert list(plain.state_dict()) == list(blurred.state_dict())
    blurred.load_state_dict(plain.state_dict())
    for name, module in blurred.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        ordinary = plain.get_submodule(name)
        x = torch.randn(2, module.in_channels, 10, 10)
        if module.stride == (2, 2) and name != "network.conv1":
            line = torch.tensor([1.0, 2, 1]) / 4
            x_blurred = nn.functional.conv2d(
                x.flatten(0, 1)[:, None], torch.outer(line, line)[None, None], padding=1
            ).view_as(x)
            torch.testing.assert_close(module(x), ordinary(x_blurred), rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(module(x), ordinary(x))


def test_blurpool_keeps_the_padding_that_a_convolution_does_itself():
    """timm's SAME convolutions have a padding of 0, and pad in their forward."""
    torch.manual_seed(0)
    layer = Conv2dSame(16, 4, 3, stride=2, bias=False)
    x = torch.randn(1, 16, 15, 14)
    line = torch.tensor([1.0, 2, 1]) / 4
    filters = torch.outer(line, line).expand(16, 1, 3, 3)
    blurred = nn.functional.conv2d(x, filters, padding=1, groups=16)
    expected = copy.deepcopy(layer)(blurred)
    convert_to_blurpool(layer)
    torch.testing.assert_close(layer(x), expected)
    assert expected.shape[2:] == (8, 7)
    assert type(layer).__module__ == Conv2dSame.__module__

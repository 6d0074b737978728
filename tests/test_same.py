"""TensorFlow's SAME padding, against numbers of TensorFlow 2.21's tf.nn.conv2d and tf.nn.max_pool2d."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rsnet.models.same import use_same_padding

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
    use_same_padding(network := nn.Sequential(conv))
    assert network(_count(size))[0, 0].tolist() == CONVOLVED[size, kernel]


@pytest.mark.parametrize("size", POOLED)
def test_a_max_pooling_is_tensorflows(size):
    use_same_padding(network := nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1)))
    assert network(-1 - _count(size))[0, 0].tolist() == POOLED[size]


def test_what_has_no_stride_or_no_padding_stays_as_it_is():
    """Without a stride PyTorch's padding is the same; timm's Conv2dSame has none, and pads by itself."""
    layers = [nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1, 2), nn.Conv2d(1, 1, 3, 2)]
    pools = [nn.MaxPool2d(1), nn.MaxPool2d(3, 2)]
    use_same_padding(nn.Sequential(*layers, *pools))
    assert {type(layer) for layer in layers} == {nn.Conv2d}
    assert {type(pool) for pool in pools} == {nn.MaxPool2d}

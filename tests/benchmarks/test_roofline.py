"""Bytes and FLOPs of a step's layers, beside those counted by hand."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

from benchmarks.roofline import Kernel, Options, kernels_of_step, seconds
from benchmarks.throughput import make_network
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import WeightsOnMeta, create_model
from rsnet.models.shapes import gmacs


class Block(nn.Module):
    """conv, BatchNorm, ReLU; then conv, BatchNorm, plus what it got, ReLU; then a mean and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(self.pool(out).flatten(1))


E = 2 * 8 * 4 * 4  # elements of every activation, of two images of 4 x 4 pixels
CONV1 = 2 * (2 * 3 * 16 + 8 * 3 * 9 + E)  # bytes: images, weight, output
CONV2 = 2 * (E + 64 + E)
POOL = 2 * (E + 16)
FC = 2 * (16 + 40 + 10)
PARAMETERS = 8 * 27 + 64 + 40 + 4 * 8
SAME = {
    ("convolution", False): CONV1 + CONV2,
    ("convolution", True): CONV1 + 2 * CONV2,  # the images need no gradient
    ("pooling", False): POOL,
    ("pooling", True): POOL,
    ("classifier", False): FC,
    ("classifier", True): 2 * FC,
    ("weights", True): (20 + 6 + 2 + 4) * PARAMETERS,
}
EAGER = {
    ("BatchNorm", False): 2 * 2 * 3 * E,
    ("BatchNorm", True): 2 * 2 * 5 * E,
    ("activation", False): 2 * 2 * 2 * E,
    ("activation", True): 2 * 2 * 3 * E,
    ("sum", False): 2 * 3 * E,
    ("sum", True): 2 * 3 * E,
}
COMPILED = {
    ("BatchNorm", False): 2 * (3 + 4) * E,
    ("BatchNorm", True): 2 * (7 + 7) * E,
    ("sum", True): 2 * E,
}
FUSED = {
    ("BatchNorm", False): 2 * (3 + 4) * E,
    ("BatchNorm", True): 2 * (5 + 8) * E,
    ("sum", True): 2 * 3 * E,
}


@pytest.mark.parametrize(
    ("way", "expected"), [("eager", EAGER), ("compiled", COMPILED), ("fused", FUSED)]
)
def test_bytes_of_a_block_are_those_counted_by_hand(way, expected):
    kernels = kernels_of_step(Block().to("meta").eval(), Options(sizes=(4,), batch_size=2))[way]
    found: dict = defaultdict(float)
    for kernel in kernels:
        found[kernel.kind, kernel.backward] += kernel.bytes
    assert found == SAME | expected


@pytest.mark.slow
def test_flops_are_those_that_pytorch_counts():
    """Of forward; backward has twice as many, but for the first layer's images."""
    with WeightsOnMeta():
        network = make_network("parallel_resnet50").to("meta").eval()
    kernels = kernels_of_step(network, Options(sizes=(64,), batch_size=1))["eager"]
    expected = 2e9 * gmacs(create_model(ModelConfig("parallel_resnet50", 1000, (64,))), 64)
    first = 2 * 64 * 32 * 32 * 3 * 7 * 7
    flops = {b: sum(k.flops for k in kernels if k.backward == b) for b in (False, True)}
    assert flops[False] == pytest.approx(expected)
    assert flops[True] == pytest.approx(2 * expected - first)


def test_a_kernel_takes_the_longer_of_bytes_and_flops():
    o = Options(terabytes_per_s=2.0, teraflops=100.0)
    of_memory, of_arithmetic = Kernel("pooling", False, 4e12, 1e14), Kernel("sum", True, 2e12, 3e14)
    assert seconds([of_memory, of_arithmetic], o) == pytest.approx(2 + 3)


def test_a_depthwise_convolution_has_the_flops_of_its_groups():
    network = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, bias=False)).to(torch.device("meta"))
    kernels = kernels_of_step(network, Options(sizes=(5,), batch_size=1))["eager"]
    assert kernels[0].flops == 2 * (6 * 3 * 3) * 9

"""Strided 1 x 1 convolutions of few channels: the shortcuts of very narrow ResNets."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

# oneDNN's block of input channels in float32 with AVX-512.
BLOCK = 16


class SkippingConv2d(nn.Conv2d):
    """A strided 1 x 1 convolution as one of stride 1 on the pixels that it sees: the same numbers.

    oneDNN's float32 weight gradient of a strided one writes past its workspace if a channels-last
    input has fewer channels than a block (oneDNN issue 6035; torch 2.15 on a CPU crashes).
    """

    def forward(self, x: Tensor) -> Tensor:
        down, right = self.stride
        return F.conv2d(x[..., ::down, ::right], self.weight, self.bias, groups=self.groups)


def use_skipping_convolutions(network: nn.Module) -> None:
    """Make the strided 1 x 1 convolutions of `network` that have so few channels such ones, in place."""
    for module in network.modules():
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (1, 1)
            and module.padding == (0, 0)
            and max(module.stride) > 1
            and module.in_channels < BLOCK
        ):
            module.__class__ = SkippingConv2d

"""Strided convolutions of a single pixel, which the smallest sizes lead to (16 pixels in a ResNet)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SinglePixelConv2d(nn.Conv2d):
    """A padded k x k convolution that applies its centre alone to a 1 x 1 input: the same numbers.

    The rest of the kernel meets only padding. oneDNN's bfloat16 weight gradient of that rest reads
    outside the picture if the stride is above 1 (seen with torch 2.15 on a CPU: gradients up to 1e33),
    and the shared weight carries it to every other size.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (1, 1):
            return super().forward(x)
        row, column = (k // 2 for k in self.kernel_size)
        center = self.weight[:, :, row : row + 1, column : column + 1]
        return F.conv2d(x, center, self.bias, groups=self.groups)


def use_single_pixel_convolutions(network: nn.Module) -> None:
    """Make the strided convolutions of `network`, padded by half their kernel, such ones, in place."""
    for module in network.modules():
        if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
            continue
        half = tuple(k // 2 for k in module.kernel_size)
        if max(module.stride) > 1 and max(module.kernel_size) > 1 and module.padding == half:
            module.__class__ = SinglePixelConv2d

"""Strided convolutions that see a blurred input, so that what they skip is not aliased."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsnet.models.layers.onednn_workarounds import SinglePixelConv2d

# ffcv-imagenet leaves out layers of fewer channels: the first, which sees the picture.
LEAST_CHANNELS = 16


class BlurredConv2d(SinglePixelConv2d):
    """A convolution after a 3 x 3 binomial filter (Zhang 2019, section 3.2, in the order of ffcv-imagenet:
    blur, then the strided convolution). Its parameters have the convolution's names."""

    blur: Tensor  # (channels, 1, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (1, 1):  # else there is nothing to blur
            x = F.conv2d(x, self.blur, padding=1, groups=x.shape[1])
        return super().forward(x)


def use_blurpool(network: nn.Module) -> None:
    """Blur before every strided convolution of at least 16 channels, in place."""
    for module in network.modules():
        if (
            isinstance(module, nn.Conv2d)
            and max(module.stride) > 1
            and module.in_channels >= LEAST_CHANNELS
        ):
            module.__class__ = BlurredConv2d
            line = torch.tensor([0.25, 0.5, 0.25], device=module.weight.device)
            kernel = (line[:, None] * line).repeat(module.in_channels, 1, 1, 1)
            module.register_buffer("blur", kernel, persistent=False)

"""Convolutions and poolings whose input is blurred first, or padded as TensorFlow pads it.

`convert_*` change the class of modules, so that names and parameters stay.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsnet.models.layers.onednn_workarounds import SinglePixelConv2d

# ffcv-imagenet leaves out layers of fewer channels: the first, which sees the image.
LEAST_CHANNELS = 16


class _Blur(nn.Module):
    """A mixin before a convolution's class: a 3 x 3 binomial filter comes first (Zhang 2019, section 3.2).

    In the order of ffcv-imagenet. The parameters have the convolution's names.
    """

    blur: Tensor  # (channels, 1, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (1, 1):  # else there is nothing to blur
            x = F.conv2d(x, self.blur, padding=1, groups=x.shape[1])
        return cast(Tensor, super().forward(x))


class BlurredConv2d(_Blur, SinglePixelConv2d):
    """A convolution after a blur."""


def convert_to_blurpool(network: nn.Module) -> None:
    """Blur before every strided convolution of at least 16 input channels, in place."""
    for module in network.modules():
        if (
            isinstance(module, nn.Conv2d)
            and max(module.stride) > 1
            and module.in_channels >= LEAST_CHANNELS
        ):
            kind = type(module)
            if kind in (nn.Conv2d, SinglePixelConv2d):
                module.__class__ = BlurredConv2d
            else:  # such as timm's, which pads in its forward; from its module, as `autocast` goes by that
                own = {"__module__": kind.__module__}
                module.__class__ = type(f"Blurred{kind.__name__}", (_Blur, kind), own)
            line = torch.tensor([0.25, 0.5, 0.25], device=module.weight.device)
            kernel = (line[:, None] * line).repeat(module.in_channels, 1, 1, 1)
            module.register_buffer("blur", kernel, persistent=False)


def convert_to_same_padding(network: nn.Module) -> None:
    """Let the strided convolutions and max poolings of `network` that pad do it as TensorFlow, in place.

    3x3 with stride 2 on an even size: no pixel before, one after; 7x7: two and three. timm's own layers
    for SAME, which have a padding of 0, stay.
    """
    for module in network.modules():
        if (
            isinstance(module, nn.Conv2d | nn.MaxPool2d)
            and _side(module.kernel_size) > 1
            and _side(module.stride) > 1
            and module.padding not in (0, (0, 0))
        ):
            is_pool = isinstance(module, nn.MaxPool2d)
            module.padding = 0 if is_pool else (0, 0)
            kind = type(module)
            module.__class__ = type(f"Same{kind.__name__}", (_SamePadding, kind), {})
            padded: Any = module
            padded.same_value = -torch.inf if is_pool else 0.0


class _SamePadding(nn.Module):
    """A mixin before the class of a convolution or max pooling, whose own padding is then 0."""

    same_value: float  # what is padded with

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        kernel, stride = _side(own.kernel_size), _side(own.stride)
        sides = []
        for length in reversed(x.shape[2:]):
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            sides += [total // 2, total - total // 2]
        return cast(Tensor, super().forward(F.pad(x, sides, value=self.same_value)))


def _side(size: int | tuple[int, ...]) -> int:
    """Return the length of a square's side."""
    return size if isinstance(size, int) else size[0]

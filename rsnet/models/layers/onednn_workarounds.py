"""Convolutions that oneDNN computes slowly, inexactly, or not at all on a CPU, computed in another way.

`convert_*` change the class of the modules that are concerned, so that names and parameters stay.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Values in float32 at once: 4 MB stay in the caches, and are no new pages of memory each time (16 images of
# 96 x 112 x 112 pixels: 41 ms instead of 97).
CHUNK = 2**20

# oneDNN's block of input channels in float32 with AVX-512.
BLOCK = 16


class SinglePixelConv2d(nn.Conv2d):
    """A padded k x k convolution that applies its centre alone to a 1 x 1 input: the same numbers.

    The rest of the kernel meets only padding. oneDNN's bfloat16 weight gradient of that rest reads
    outside the image if the stride is above 1 (seen with torch 2.15 on a CPU: gradients up to 1e33),
    and the shared weight carries it to every other size.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (1, 1):
            return super().forward(x)
        row, column = (k // 2 for k in self.kernel_size)
        center = self.weight[:, :, row : row + 1, column : column + 1]
        return F.conv2d(x, center, self.bias, groups=self.groups)


def convert_single_pixel_convs(network: nn.Module) -> None:
    """Convert the strided convolutions of `network`, padded by half their kernel, in place."""
    for module in network.modules():
        if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
            continue
        half = tuple(k // 2 for k in module.kernel_size)
        if max(module.stride) > 1 and max(module.kernel_size) > 1 and module.padding == half:
            module.__class__ = SinglePixelConv2d


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that computes its gradients in float32 where a CPU trains in bfloat16.

    oneDNN has no fast bfloat16 backward of strided ones, or of kernels above 3 x 3 (torch 2.15, Zen 4, a
    forward and backward of (8, 576, 14, 14), 3 x 3, stride 2: 15.5 ms; this 0.8 ms). The gradients are
    rounded less often; the forward is the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        # It has a bias after BatchNorm is folded.
        trains = torch.is_grad_enabled() and self.bias is None
        if trains and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            # Not the copy that `cast_weights_once` rounded. A quantized weight is no parameter.
            weight = self._parameters.get("weight", self.weight)
            return cast(Tensor, _Depthwise.apply(x.to(dtype), weight, self.stride, self.padding))
        return super().forward(x)


def convert_depthwise_convs(network: nn.Module) -> None:
    """Convert the depthwise convolutions of `network` that are strided or wider than 3 x 3, in place.

    Those that pad or blur their input themselves stay as they are.
    """
    for module in network.modules():
        if (
            isinstance(module, nn.Conv2d)
            and type(module) in (nn.Conv2d, SinglePixelConv2d)
            and module.groups == module.in_channels == module.out_channels > 1
            and module.bias is None
            and module.dilation == (1, 1)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and (max(module.stride) > 1 or max(module.kernel_size) > 3)
        ):
            module.__class__ = DepthwiseConv2d


class SubsampledConv2d(nn.Conv2d):
    """A strided 1 x 1 convolution that subsamples its input, then strides by 1: the same numbers.

    oneDNN's float32 weight gradient of a strided one writes past its workspace if a channels-last
    input has fewer channels than a block (oneDNN issue 6035; torch 2.15 on a CPU crashes).
    """

    def forward(self, x: Tensor) -> Tensor:
        down, right = self.stride
        return F.conv2d(x[..., ::down, ::right], self.weight, self.bias, groups=self.groups)


def convert_pointwise_convs(network: nn.Module) -> None:
    """Convert the strided 1 x 1 convolutions of `network` with fewer than 16 input channels, in place."""
    for module in network.modules():
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (1, 1)
            and module.padding == (0, 0)
            and max(module.stride) > 1
            and module.in_channels < BLOCK
        ):
            module.__class__ = SubsampledConv2d


class _Depthwise(torch.autograd.Function):
    """The gradient of the weight has the weight's own precision, float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x, weight.to(x.dtype), None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.geometry
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        rounded = weight.to(x.dtype).float()
        images = max(1, CHUNK // x[0].numel())
        for i in range(0, len(x), images):
            part = slice(i, i + images)
            part_of_x, part_of_weight, _ = torch.ops.aten.convolution_backward(
                gradients[0][part].float(), x[part].float(), rounded, None,
                stride, padding, [1, 1], False, [0, 0], len(weight), [of_x is not None, True, False],
            )  # fmt: skip
            of_weight += part_of_weight
            if of_x is not None:
                of_x[part] = part_of_x
        return of_x, of_weight, None, None

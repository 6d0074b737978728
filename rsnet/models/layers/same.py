"""TensorFlow's SAME padding, which networks trained there need: with a stride above 1 it is not symmetric."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Same(nn.Module):
    """Put before the class of a convolution or max pooling, whose own padding is then 0."""

    same_value: float  # what is padded with

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        kernel, stride = _first(own.kernel_size), _first(own.stride)
        sides = []
        for length in reversed(x.shape[2:]):
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            sides += [total // 2, total - total // 2]
        return cast(Tensor, super().forward(F.pad(x, sides, value=self.same_value)))


def use_same_padding(network: nn.Module) -> None:
    """Make the strided convolutions and max poolings of `network` that pad do it as TensorFlow, in place.

    3x3 with stride 2 on an even size: no pixel before, one after; 7x7: two and three. timm's own layers
    for SAME, which have a padding of 0, stay.
    """
    for module in network.modules():
        if (
            isinstance(module, nn.Conv2d | nn.MaxPool2d)
            and _first(module.kernel_size) > 1
            and _first(module.stride) > 1
            and module.padding not in (0, (0, 0))
        ):
            is_pool = isinstance(module, nn.MaxPool2d)
            module.padding = 0 if is_pool else (0, 0)
            kind = type(module)
            module.__class__ = type(f"Same{kind.__name__}", (_Same, kind), {})
            same: Any = module
            same.same_value = -torch.inf if is_pool else 0.0


def _first(size: int | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]

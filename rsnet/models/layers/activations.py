"""Activations that do not make autograd copy their input.

Where the derivative is a function of the input, autograd copies it before an activation in place overwrites
it: a pass over memory that an activation out of place does not need. ReLU6's is also a function of its
output, which the next layer keeps anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ReLU6(nn.ReLU6):
    """An nn.ReLU6 that keeps its output for the backward, not its input: the same bits.

    As after a ReLU, nothing may overwrite that output in place; autograd says so where it happens.
    """

    def forward(self, x: Tensor) -> Tensor:
        # A compiler chooses by itself what to keep.
        if _trains(x) and not torch.compiler.is_compiling():
            return cast(Tensor, _ReLU6.apply(x, self.inplace))
        return super().forward(x)


class _ReLU6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y = F.relu6(x, inplace)
        if inplace:
            ctx.mark_dirty(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient passes strictly between the bounds, where the output lies exactly if the input does.
        return torch.ops.aten.hardtanh_backward(gradients[0], *ctx.saved_tensors, 0.0, 6.0), None


class _OutOfPlace(nn.Module):
    """A mixin before an activation's class: in training it does not overwrite its input."""

    function: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Any:
        return type(self).function(x) if _trains(x) else super().forward(x)


class SiLU(_OutOfPlace, nn.SiLU):
    function = staticmethod(F.silu)


class Hardswish(_OutOfPlace, nn.Hardswish):
    function = staticmethod(F.hardswish)


class Hardsigmoid(_OutOfPlace, nn.Hardsigmoid):
    function = staticmethod(F.hardsigmoid)


class Mish(_OutOfPlace, nn.Mish):
    function = staticmethod(F.mish)


_CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU6: ReLU6, nn.SiLU: SiLU, nn.Hardswish: Hardswish, nn.Hardsigmoid: Hardsigmoid, nn.Mish: Mish,
}  # fmt: skip


def convert_activations(network: nn.Module) -> None:
    """Convert the activations of `network` whose input autograd would copy, in place."""
    for module in network.modules():
        if converted := _CONVERTED.get(type(module)):
            module.__class__ = converted


def _trains(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad

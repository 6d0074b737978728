"""BatchNorm in training, with the sum and the ReLU that follow, in few passes over memory.

At the end of a residual block, PyTorch's forward makes eight passes over memory of the tensor's size:
three times in BatchNorm, three in the sum, two in the ReLU. Here the convolution's output is read twice, the
residual once, and the result is written; the backward computes the normalised values again, of the
convolution's output, mean and deviation. The kernels are Triton's, in `fused_batchnorm_triton`. Not measured
on a GPU.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from rsnet.models.layers.drop_path import DropPathBasicBlock, DropPathBottleneck
from rsnet.models.switchable import SwitchableBatchNorm2d

Activation = Literal["none", "relu", "relu6"]
_FUNCTIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _kernels() -> Any:
    return importlib.import_module("rsnet.models.layers.fused_batchnorm_triton")


def _launched_for(x: Tensor) -> AbstractContextManager[None]:
    """Make the device of `x` the current one, which Triton launches on."""
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]


# Two operations, because PyTorch cannot differentiate a custom operation that mutates its arguments.
@torch.library.custom_op(
    "rsnet::batch_norm_statistics",
    mutates_args=("running_mean", "running_var"),
    schema="(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float eps)"
    " -> (Tensor, Tensor)",
)
def batch_norm_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / sqrt(var + eps) of the channels of x, (N, C, h, w) channels-last, as (C,) float32.

    Moves the running statistics in place, the variance without bias, as `nn.BatchNorm2d` does.
    """
    with _launched_for(x):
        found = _kernels().statistics(x, running_mean, running_var, momentum, eps)
    return cast(tuple[Tensor, Tensor], found)


@batch_norm_statistics.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    empty = x.new_empty(x.shape[1], dtype=torch.float32)
    return empty, torch.empty_like(empty)


@torch.library.custom_op(
    "rsnet::batch_norm_act",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, Tensor? residual, str act)"
    " -> Tensor",
)
def batch_norm_act(  # noqa: PLR0917 - a custom operation has no keywords
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    act: str,
) -> Tensor:
    """Return act((x - mean) * rstd * weight + bias + residual), like x. mean, rstd: the statistics of x.

    Its gradient is BatchNorm's: that of x goes through mean and rstd, which get none.
    """
    with _launched_for(x):
        return cast(Tensor, _kernels().apply(x, (weight, bias, mean, rstd), residual, act))


@batch_norm_act.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(
    "rsnet::batch_norm_act_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor x, Tensor? y, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
    "str act) -> Tensor[]",
)
def batch_norm_act_backward(  # noqa: PLR0917
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    act: str,
) -> list[Tensor]:
    """Return the gradients of x, weight and bias, and, given y, in which a residual is, of that, too."""
    with _launched_for(x):
        found = _kernels().gradients(grad_y, x, y, (weight, bias, mean, rstd), act)
    return cast(list[Tensor], found)


@batch_norm_act_backward.register_fake
def _(
    _of_y: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, *_: Any
) -> list[Tensor]:
    like = [x, weight, bias] if y is None else [x, weight, bias, x]
    return [torch.empty_like(t) for t in like]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, mean, rstd, residual, act = inputs
    ctx.act, ctx.adds = act, residual is not None
    # With a residual, what the activation saw cannot be computed of x alone; the next layer keeps y anyway.
    y = output if ctx.adds and act != "none" else None
    ctx.save_for_backward(x, y, weight, bias, mean, rstd)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    found = batch_norm_act_backward(grad_y, *ctx.saved_tensors, ctx.act)
    grad_x, grad_weight, grad_bias = found[:3]
    grad_residual = found[-1] if len(found) > 3 else grad_y if ctx.adds else None
    return grad_x, grad_weight, grad_bias, None, None, grad_residual, None


batch_norm_act.register_autograd(_backward, setup_context=_setup_context)


class AddActivation(nn.Module):
    """act(x + residual): what follows a BatchNorm."""

    def __init__(self, kind: Activation) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return cast(Tensor, _FUNCTIONS[self.kind](x if residual is None else x + residual))


class FusedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm with what follows it, `act`: fused in training on a GPU, in channels-last; else one by one.

    Statistics and their names are nn.BatchNorm2d's.
    """

    act: AddActivation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not (self.training and _is_fit(x, residual)):
            return cast(Tensor, self.act(super().forward(x), residual))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        with torch.no_grad():
            mean, rstd = batch_norm_statistics(
                x, self.running_mean, self.running_var, self.momentum, self.eps
            )
        result = batch_norm_act(x, self.weight, self.bias, mean, rstd, residual, self.act.kind)
        return cast(Tensor, result)


def _is_fit(x: Tensor, residual: Tensor | None) -> bool:
    is_like_x = residual is None or (residual.shape, residual.dtype) == (x.shape, x.dtype)
    return (
        _has_kernels(x)
        and is_like_x
        and x.dtype in DTYPES
        and x.dim() == 4
        # With one value per channel PyTorch raises an error, as there is no variance.
        and x.numel() > x.shape[1]
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


class _FusedBasicBlock(BasicBlock):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.bn1(self.conv1(x)))
        return cast(Tensor, self.bn2(out, x if self.downsample is None else self.downsample(x)))


class _FusedBottleneck(Bottleneck):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        return cast(Tensor, self.bn3(out, x if self.downsample is None else self.downsample(x)))


class _FusedInvertedResidual(InvertedResidual):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        *body, norm = self.conv
        out = x
        for layer in body:
            out = layer(out)
        return cast(Tensor, norm(out, x))


def convert_to_fused_batchnorm(network: nn.Module) -> list[str]:
    """Fuse BatchNorms of a switchable network with what follows them, in place; return their names.

    These are the ones in torchvision's residual blocks, and those before a ReLU or ReLU6 in an
    `nn.Sequential`. The names of parameters and statistics stay.
    """
    uses = Counter(id(m) for _, m in network.named_modules(remove_duplicate=False))
    fused: set[nn.Module] = set()
    for module in list(network.modules()):
        for followed, leave_out in _places(module):
            if not all(_can_be_fused(norm) and uses[id(norm)] == 1 for norm in followed):
                continue
            for norm, kind in followed.items():
                act = AddActivation(kind)
                for layer in norm.by_resolution:
                    layer.__class__ = FusedBatchNorm2d
                    layer.act = act
            leave_out()
            fused |= followed.keys()
    return [name for name, module in network.named_modules() if module in fused]


def _places(module: Any) -> Iterator[tuple[dict[Any, Activation], Callable[[], None]]]:
    """Yield the BatchNorms that `module` applies, with the activations that follow, and what leaves these out
    of its own forward. A sum before the activation is the BatchNorm's second input."""
    kind = type(module)
    if kind is BasicBlock:
        yield {module.bn1: "relu", module.bn2: "relu"}, partial(_become, module, _FusedBasicBlock)
    elif kind is Bottleneck:
        norms: dict[Any, Activation] = dict.fromkeys((module.bn1, module.bn2, module.bn3), "relu")
        yield norms, partial(_become, module, _FusedBottleneck)
    elif kind is DropPathBasicBlock:
        yield {module.bn1: "relu"}, partial(module.set_submodule, "act1", nn.Identity())
    elif kind is DropPathBottleneck:
        norms = dict.fromkeys((module.bn1, module.bn2), "relu")
        yield norms, partial(module.set_submodule, "act1", nn.Identity())
    elif kind is InvertedResidual and module.use_res_connect:
        yield {module.conv[-1]: "none"}, partial(_become, module, _FusedInvertedResidual)
    elif isinstance(module, ResNet):
        yield {module.bn1: "relu"}, partial(module.set_submodule, "relu", nn.Identity())
    elif isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
        for (_, norm), (name, layer) in pairwise(module.named_children()):
            if isinstance(layer, nn.ReLU | nn.ReLU6):
                act: Activation = "relu" if isinstance(layer, nn.ReLU) else "relu6"
                yield {norm: act}, partial(module.set_submodule, name, nn.Identity())


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _can_be_fused(norm: nn.Module) -> bool:
    return isinstance(norm, SwitchableBatchNorm2d) and all(
        type(layer) is nn.BatchNorm2d
        and layer.affine
        and layer.track_running_stats
        and layer.momentum is not None
        for layer in norm.by_resolution
    )

"""Stochastic depth (Huang et al. 2016): in training, a part of the samples goes without residual branches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth, stochastic_depth

from rsnet.models.preact_resnet import Block


class DropPath(nn.Module):
    """In training, multiplies a branch by 0 for a share `rate` of the samples, by 1 / (1 - rate) for others.

    factors: (N,), these numbers, which a training sets before each batch, so that all sizes of a sample go
    without the same branches, see `rsnet.training.drop_path`. None: each forward draws its own, as
    torchvision's StochasticDepth. It is no buffer: neither a state dict nor DDP knows of it.
    """

    factors: Tensor | None

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.factors = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        if self.factors is None:
            return cast(Tensor, stochastic_depth(x, self.rate, "row"))
        # Networks that cut images into patches have several rows of a sample, one behind the other.
        rows = self.factors.to(x.dtype).view(-1, 1).expand(-1, len(x) // len(self.factors))
        return x * rows.reshape(-1, *[1] * (x.dim() - 1))


class DropPathBasicBlock(BasicBlock):  # type: ignore[misc]
    """torchvision's, with `drop_path` at the end of its branch, and `act1`, the activation before that."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.act1(self.bn1(self.conv1(x))))
        return _added(self, self.bn2(out), x)


class DropPathBottleneck(Bottleneck):  # type: ignore[misc]
    """torchvision's; as `DropPathBasicBlock`."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.act1(self.bn1(self.conv1(x))))
        out = self.conv3(self.act1(self.bn2(out)))
        return _added(self, self.bn3(out), x)


def _added(block: Any, branch: Tensor, x: Tensor) -> Tensor:
    shortcut = x if block.downsample is None else block.downsample(x)
    return cast(Tensor, block.relu(block.drop_path(branch) + shortcut))


def convert_to_drop_path(network: nn.Module, rate: float | None) -> int:
    """Let residual branches of `network` be dropped, in place; return the number of those that are.

    The rate grows linearly with the depth. In torchvision's ResNets and MobileNetV2, and in pre-activation
    ResNets, it is as in timm's of that name: from 0 in a ResNet's first block to `rate` in its last. Where
    the network was built with layers of its library for it, these become `DropPath`s of the same rate. Names
    of weights stay.

    rate: None or 0: such layers alone.
    """
    for name, module in list(network.named_modules()):
        own = _rate_of(module)
        if own is not None:
            network.set_submodule(name, DropPath(own))
    for block, share in _blocks(network) if rate else ():
        _insert(block, DropPath(share * cast(float, rate)))
    return sum(isinstance(module, DropPath) for module in network.modules())


def _rate_of(module: Any) -> float | None:
    """Return the rate of a library's layer for stochastic depth of single samples, None of any other."""
    if isinstance(module, StochasticDepth) and module.mode == "row":
        return float(module.p)
    is_timms = type(module).__name__ == "DropPath" and type(module).__module__.startswith("timm.")
    if is_timms and module.scale_by_keep:
        return float(module.drop_prob or 0.0)
    return None


def _blocks(network: nn.Module) -> Iterator[tuple[Any, float]]:
    """Yield the blocks that a branch can be dropped in, with their share of the rate, above 0."""
    residual = [m for m in network.modules() if type(m) in (BasicBlock, Bottleneck, Block)]
    for i, block in enumerate(residual[1:], start=1):
        yield block, i / (len(residual) - 1)
    # As in EfficientNets, those without a shortcut count, and the last has not quite the whole rate.
    inverted = [m for m in network.modules() if type(m) is InvertedResidual]
    for i, block in enumerate(inverted):
        if block.use_res_connect and i:
            yield block, i / len(inverted)


def _insert(block: Any, drop_path: DropPath) -> None:
    if isinstance(block, Block | InvertedResidual):
        branch = block.residual if isinstance(block, Block) else block.conv
        branch.add_module("drop_path", drop_path)  # behind its BatchNorm
        return
    block.__class__ = DropPathBasicBlock if type(block) is BasicBlock else DropPathBottleneck
    block.drop_path, block.act1 = drop_path, block.relu

"""Pre-activation ResNets whose activations can be quantized (RS-Nets' authors' quantized training code).

They differ from He et al. 2016 ("Identity Mappings"): a block's last convolution is followed by BatchNorm,
and the first block of a stage has no activation of its own, because every stage ends with one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, cast

from torch import Tensor, nn
from torch.nn import functional as F

from rsnet.models.quantization.lq_nets import QuantStub

Shortcut = Literal["A", "B"]
Before = Literal["activation", "quantizer", "nothing"]

# Blocks of each stage, and whether they are bottlenecks.
LAYERS: dict[str, tuple[list[int], bool]] = {
    "resnet10": ([1, 1, 1, 1], False),
    "resnet18": ([2, 2, 2, 2], False),
    "resnet34": ([3, 4, 6, 3], False),
    "resnet50": ([3, 4, 6, 3], True),
    "resnet101": ([3, 4, 23, 3], True),
    "resnet152": ([3, 8, 36, 3], True),
}


class Activation(nn.Sequential):
    """BatchNorm, ReLU and, unless it is the network's last, a quantizer's placeholder."""

    def __init__(self, channels: int, quantized: bool = True) -> None:
        parts: list[tuple[str, nn.Module]] = [
            ("bn", nn.BatchNorm2d(channels)),
            ("relu", nn.ReLU(inplace=True)),
        ]
        if quantized:
            parts.append(("quant", QuantStub()))
        super().__init__(OrderedDict(parts))


class Block(nn.Module):
    """A basic block, 3x3 3x3, or a bottleneck, 1x1 3x3 1x1: (N, in, h, w) -> (N, out, h/stride, w/stride).

    before: what is applied to the input of the convolutions: "activation" BatchNorm, ReLU and quantizer,
    "quantizer" that alone, "nothing" if it is quantized already. The shortcut always has the input itself.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        stride: int,
        bottleneck: bool,
        shortcut: Shortcut,
        before: Before,
    ) -> None:
        super().__init__()
        self.before: nn.Module = nn.Identity()
        if before == "activation":
            self.before = Activation(channels)
        elif before == "quantizer":
            self.before = QuantStub()
        # (output channels, kernel, stride) of each convolution
        shape = (
            [(out // 4, 1, 1), (out // 4, 3, stride), (out, 1, 1)]
            if bottleneck
            else [(out, 3, stride), (out, 3, 1)]
        )
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        inner = channels
        for i, (outer, kernel, step) in enumerate(shape, start=1):
            parts[f"conv{i}"] = _conv(inner, outer, kernel, step)
            if i < len(shape):
                parts[f"act{i}"] = Activation(outer)
            inner = outer
        parts["bn"] = nn.BatchNorm2d(out)
        self.residual = nn.Sequential(parts)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = (
                nn.Sequential(_conv(channels, out, 1, stride), nn.BatchNorm2d(out))
                if shortcut == "B"
                else PooledShortcut(stride, out - channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.residual(self.before(x)) + self.shortcut(x))


class PooledShortcut(nn.Module):
    """Shortcut A: average pooling, and zeros for the `more` additional channels."""

    def __init__(self, stride: int, more: int) -> None:
        super().__init__()
        self.stride = stride
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        # Odd sizes are rounded up, as the convolutions do it.
        pooled = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(pooled, (0, 0, 0, 0, 0, self.more))


class PreActResNet(nn.Module):
    """(N, 3, s, s) -> (N, classes), initialised as the authors'.

    name: of `LAYERS`. shortcut: "B", a quantized 1x1 convolution and BatchNorm, where the shape changes; or
    "A", see `PooledShortcut`. width_mult: times the channels of every layer, at least 8.

    Under "B" a stage ends with the quantizer that its successor's first block, and its shortcut, read; under
    "A" that block has a quantizer of its own, and the shortcut reads what is not quantized.
    """

    def __init__(
        self, name: str, num_classes: int, shortcut: Shortcut = "B", width_mult: float = 1.0
    ) -> None:
        super().__init__()
        counts, bottleneck = LAYERS[name]
        widths = [max(8, round(64 * 2**i * width_mult)) for i in range(4)]
        channels = widths[0]
        self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for i, (count, width) in enumerate(zip(counts, widths, strict=True)):
            out = 4 * width if bottleneck else width
            stage: OrderedDict[str, nn.Module] = OrderedDict()
            for j in range(count):
                first: Before = "quantizer" if i == 0 or shortcut == "A" else "nothing"
                stride = 2 if j == 0 < i else 1
                stage[str(j)] = Block(
                    channels, out, stride, bottleneck, shortcut, "activation" if j else first
                )
                channels = out
            stage["last"] = Activation(channels, quantized=shortcut == "B" and i < 3)
            self.add_module(f"layer{i + 1}", nn.Sequential(stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        init_classifier(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return cast(Tensor, self.fc(self.avgpool(x).flatten(1)))


def init_classifier(layer: nn.Linear) -> None:
    """Initialise as tensorpack's FullyConnected, in place: N(0, 2 / inputs), bias 0."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)


def _conv(channels: int, out: int, kernel: int, stride: int) -> nn.Conv2d:
    """Return a convolution that pads by half its kernel and has no bias."""
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)

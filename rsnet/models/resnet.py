"""Variants of torchvision's ResNets: other widths, ResNet-10, and a stem for small images."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

# Blocks of each stage. ResNet-10 is ResNet-18 with one block a stage.
LAYERS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}


def scaled_resnet(name: str, num_classes: int, width_mult: float = 1.0) -> nn.Module:
    """Return a ResNet of `LAYERS`; every layer has `width_mult` times its channels, at least 8."""
    return _ScaledResNet(*LAYERS[name], num_classes, width_mult)


def convert_to_small_stem(network: nn.Module) -> None:
    """Let the first convolution of `network` be 3 x 3 with stride 1, and remove the first max pooling, in
    place.

    He et al. 2016 (section 4.2) start so on CIFAR-10. A convolution larger than 3 x 3 is replaced by a new
    one, which is initialised by Kaiming's fan-out.
    """
    name, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if max(first.kernel_size) > 3:
        conv = nn.Conv2d(
            first.in_channels, first.out_channels, 3, padding=1, bias=first.bias is not None
        )
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        network.set_submodule(name, conv)
    else:
        first.stride = (1, 1)
    pools = (n for n, m in network.named_modules() if isinstance(m, nn.MaxPool2d))
    if pool := next(pools, None):
        network.set_submodule(pool, nn.Identity())


class _ScaledResNet(ResNet):  # type: ignore[misc]
    inplanes: int
    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        num_classes: int,
        width_mult: float,
    ) -> None:
        self._width_mult = width_mult
        super().__init__(block, layers, num_classes)
        self.fc = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        if planes == 64:  # the first stage: the stem before it was built at full width
            self.inplanes = self._scaled(64)
            self.conv1 = nn.Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(self.inplanes)
        layer: nn.Sequential = super()._make_layer(block, self._scaled(planes), *args, **options)
        return layer

    def _scaled(self, channels: int) -> int:
        return max(8, round(channels * self._width_mult))

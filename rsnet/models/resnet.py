"""torchvision's ResNets at other widths, and ResNet-10: small networks for small images."""

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
    """The ResNet of `LAYERS`, every layer with `width_mult` times its channels, at least 8."""
    return _ScaledResNet(*LAYERS[name], num_classes, width_mult)


class _ScaledResNet(ResNet):  # type: ignore[misc]
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
        if planes == 64:  # the first stage: what stands before it was built at full width
            self.inplanes = self._scaled(64)
            self.conv1 = nn.Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(self.inplanes)
        layer: nn.Sequential = super()._make_layer(block, self._scaled(planes), *args, **options)
        return layer

    def _scaled(self, channels: int) -> int:
        return max(8, round(channels * self._width_mult))

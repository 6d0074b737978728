"""Networks as exporters take them: one size, without what only this trainer's layers can compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsnet.models.fold import fold_batchnorm, plain
from rsnet.models.quantization.encode import level_table
from rsnet.models.quantization.lq_nets import ActivationQuantizer
from rsnet.models.switchable import ResolutionSwitchable


class Levels(nn.Module):
    """What an `ActivationQuantizer` gives, by a binary search: a comparison and a look-up for each bit."""

    thresholds: Tensor
    levels: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.bits = quantizer.bits
        thresholds, levels, _ = level_table(quantizer.basis, quantizer.codes)
        self.register_buffer("thresholds", thresholds[0])
        self.register_buffer("levels", levels[0])

    def forward(self, x: Tensor) -> Tensor:
        number = torch.zeros_like(x, dtype=torch.int64)
        for step in (2**bit for bit in reversed(range(self.bits))):
            number = torch.where(x > self.thresholds[number + step], number + step, number)
        return self.levels[number]


def has_levels(model: nn.Module) -> bool:
    """Whether its activations are quantized, which folding would not leave as they are."""
    return any(isinstance(m, ActivationQuantizer) for m in model.modules())


def traceable(model: ResolutionSwitchable, size: int, fold: bool) -> nn.Module:
    """The network of one size, (N, 3, size, size) -> (N, classes), of ordinary operations.

    fold: BatchNorm goes into the convolutions. Raises what `rsnet.models.fold` does.
    """
    network = fold_batchnorm(model, size) if fold else plain(model, size)
    for name, module in list(network.named_modules()):
        if isinstance(module, ActivationQuantizer):
            network.set_submodule(name, Levels(module))
    return network.requires_grad_(False)

"""Baseline: a training step in about 40 lines of current PyTorch.

torchvision's network with a private BatchNorm for each resolution, channels-last, autocast, a forward for
each resolution, one backward, fused SGD. Nothing of this project is used.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PrivateBatchNorm(nn.ModuleDict):
    """A BatchNorm for each resolution; `now` is the resolution of the current forward."""

    now = ""

    def forward(self, x: Tensor) -> Tensor:
        return self[PrivateBatchNorm.now](x)  # type: ignore[no-any-return]


def add_private_batchnorm(module: nn.Module, sizes: Sequence[int]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            copies = {str(size): copy.deepcopy(child) for size in sizes}
            setattr(module, name, PrivateBatchNorm(copies))
        else:
            add_private_batchnorm(child, sizes)


class ModernStep:
    """Forward, losses, one backward and an update, on batches of S x (N, 3, s, s).

    network: on its device, channels-last. dtype: of autocast; None for float32.
    """

    def __init__(
        self, network: nn.Module, sizes: Sequence[int], dtype: torch.dtype | None,
        lr: float, momentum: float, weight_decay: float,
    ) -> None:  # fmt: skip
        add_private_batchnorm(network, sizes)
        self._device = next(network.parameters()).device
        self._network = network.train()
        self._alpha = nn.Parameter(torch.ones(len(sizes), device=self._device))
        self._dtype = dtype
        self._sgd = torch.optim.SGD(
            [*network.parameters(), self._alpha],
            lr,
            momentum,
            weight_decay=weight_decay,
            fused=True,
        )

    def __call__(self, images: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Returns the loss, on the device."""
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            logits = [self._forward(x) for x in images]
        loss = self._loss([z.float() for z in logits], labels)
        self._sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._sgd.step()
        return loss

    def _forward(self, x: Tensor) -> Tensor:
        PrivateBatchNorm.now = str(x.shape[-1])
        return self._network(x.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]

    def _loss(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        z = torch.stack(logits)
        ensemble = (self._alpha.softmax(0)[:, None, None] * z.detach()).sum(0)
        loss = F.cross_entropy(ensemble, labels) + sum(
            F.cross_entropy(one, labels) for one in logits
        )
        for i, student in enumerate(logits):
            for teacher in (ensemble, *logits[:i]):
                p = teacher.detach().softmax(1)
                kl = F.kl_div(student.log_softmax(1), p, reduction="batchmean")
                loss = loss + 2 / (len(logits) + 1) * kl
        return loss

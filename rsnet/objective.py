"""The one module that is trained: network, ensemble weights and losses. DDP and compile wrap it whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsnet.losses import KdType, loss_terms
from rsnet.models.switchable import ResolutionSwitchable


class Objective(nn.Module):
    """images and labels -> named losses; all resolutions in one forward.

    One forward, because DDP does not allow two before a backward where there is BatchNorm.
    """

    def __init__(
        self, model: ResolutionSwitchable, kd_type: KdType | None, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.model = model
        self.kd_type = kd_type
        self.label_smoothing = label_smoothing

    def forward(self, images: tuple[Tensor, ...], labels: Tensor) -> dict[str, Tensor]:
        """S x (N, 3, s, s), the largest first, and (N,) -> terms of the loss, each (), and "total"."""
        logits = self.model.forward_all(images)
        # Softmax and sums over 1000 classes lose digits in half precision.
        with torch.autocast(labels.device.type, enabled=False):
            return loss_terms(
                logits,
                labels,
                self.model.alpha,
                self.model.sizes,
                self.kd_type,
                self.label_smoothing,
            )

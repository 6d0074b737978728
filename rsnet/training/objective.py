"""The one module that is trained: network, ensemble weights and losses. DDP and compile wrap it whole."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rsnet.losses import KdType, LossName, loss_terms
from rsnet.models.switchable import ResolutionSwitchable, count_batches_together


class Objective(nn.Module):
    """images and labels -> named losses; all resolutions in one forward.

    One forward, because with BatchNorm DDP does not allow two forwards before a backward.
    """

    def __init__(
        self,
        model: ResolutionSwitchable,
        kd_type: KdType | None,
        label_smoothing: float = 0.0,
        *,
        loss: LossName = "ce",
        target_thresh: float = 0.0,
        teacher_weight: float = 1.0,
        temperature: float = 1.0,
        teacher_loss: LossName = "ce",
    ) -> None:
        """Set up losses; the arguments are those of `loss_terms`."""
        super().__init__()
        self.model = model
        self.kd_type = kd_type
        self.label_smoothing = label_smoothing
        self.loss: LossName = loss
        self.target_thresh = target_thresh
        self.teacher_weight = teacher_weight
        self.temperature = temperature
        self.teacher_loss: LossName = teacher_loss
        self._is_compiled = False

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile as `nn.Module.compile` does, but update BatchNorm's counters outside, in one operation.
        Compiled, each would be a kernel of its own: 265 per step for a ResNet-50 at five sizes.
        """
        super().compile(*args, **options)
        self._is_compiled = True

    def __call__(
        self,
        images: tuple[Tensor, ...],
        labels: Tensor,
        sizes: Sequence[int] | None = None,
        weights: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Tensor]:
        norms = self.model.norms_of(sizes or self.model.sizes) if self._is_compiled else []
        with count_batches_together(norms):
            return cast(
                dict[str, Tensor], super().__call__(images, labels, sizes, weights, teacher)
            )

    def forward(
        self,
        images: tuple[Tensor, ...],
        labels: Tensor,
        sizes: Sequence[int] | None = None,
        weights: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the terms of the loss, each (), and "total", of S x (N, 3, s, s) and labels (N,) or (N, C).

        images: the largest first. sizes: those that take part; None for all of the network's. weights: (N,),
        the samples' in the loss; None: all 1. teacher: (N, C), the logits of a network that is not trained.
        """
        present = [i for i, s in enumerate(self.model.sizes) if sizes is None or s in sizes]
        sizes = [self.model.sizes[i] for i in present]
        logits = self.model.forward_all([images[i] for i in present], sizes)
        alpha: Tensor = self.model.alpha
        if len(present) < len(alpha):
            # Indexing with a list would copy it to the device, a synchronisation.
            alpha = torch.stack([alpha[i] for i in present])
        # Softmax and sums over 1000 classes lose digits in half precision.
        with torch.autocast(labels.device.type, enabled=False):
            return loss_terms(
                logits,
                labels,
                alpha,
                sizes,
                self.kd_type,
                self.label_smoothing,
                loss=self.loss,
                target_thresh=self.target_thresh,
                weights=weights,
                teacher=teacher,
                teacher_weight=self.teacher_weight,
                temperature=self.temperature,
                teacher_loss=self.teacher_loss,
            )


class SizeSampler:
    """Sampler of the sizes of a step: the largest and `k` - 1 of the others, drawn by (seed, step).

    Cheaper than the paper's training, whose steps use all sizes. All ranks draw the same sizes.
    """

    def __init__(self, phases: Mapping[int, Sequence[int]], k: int, seed: int) -> None:
        """phases: {first step: sizes to draw from}; the earliest step is 0. k: sizes per step; a phase with
        fewer uses all of its sizes.
        """
        self.starts = sorted(phases)
        self.phases = [tuple(sorted(phases[start], reverse=True)) for start in self.starts]
        self.k = k
        self.seed = seed

    def at(self, step: int) -> tuple[int, ...]:
        """Return the sizes of optimizer step `step`, the largest first."""
        largest, *others = self.phases[bisect_right(self.starts, step) - 1]
        # A string seed is hashed, so that neighbouring seeds and steps share nothing.
        draws = random.Random(f"{self.seed}/{step}")
        drawn = draws.sample(others, min(self.k - 1, len(others)))
        return (largest, *sorted(drawn, reverse=True))

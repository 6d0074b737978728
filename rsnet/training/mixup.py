"""Mixup and CutMix on a batch of several sizes: one partner, one share and one box for all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.batch import Batch


class Mixup:
    """Mixes every sample with its neighbour in the batch, on the device, without a synchronisation.

    mixup: Beta(a, a) of the share (Zhang et al. 2018, section 2). cutmix: of the area that stays (Yun et
    al. 2019, section 3.1). 0 leaves one out; with both, each batch draws one of them. What is drawn
    depends on (seed, batch) alone.

    weighs_shares: whether the share of a class counts times its sample's weight, so that the loss is the mean
    of both samples' weighted losses, in which cross-entropy is linear. Not with shares that become 0 or 1.

    The box lies at the same place in all sizes' images as they are. Where each size draws a flip of its own
    (--flip independent), it covers other parts of the picture at sizes that are mirrored: the labels' shares
    are right there, too, and no box would cover the same of both pictures, whose flips may differ.
    """

    def __init__(
        self,
        mixup: float,
        cutmix: float,
        num_classes: int,
        seed: int,
        weighs_shares: bool = True,
    ) -> None:
        self.kinds = [k for k, a in (("mixup", mixup), ("cutmix", cutmix)) if a > 0]
        self.strength = {"mixup": mixup, "cutmix": cutmix}
        self.num_classes = num_classes
        self.seed = seed
        self.weighs_shares = weighs_shares

    def __call__(self, batch: Batch, index: int) -> Batch:
        """Mix the training's `index`-th batch. Labels become (N, classes), the shares of the classes; weights
        mix as they do."""
        draws = random.Random(f"{self.seed}/{index}")
        kind = draws.choice(self.kinds)
        share = draws.betavariate(self.strength[kind], self.strength[kind])
        if kind == "mixup":
            images = tuple(x.lerp(_partners(x), 1 - share) for x in batch.images)
        else:
            box, share = _box(share, draws.random(), draws.random())
            images = tuple(_paste(x, box) for x in batch.images)
        labels = torch.zeros(len(batch.labels), self.num_classes, device=batch.labels.device)
        labels.scatter_(1, batch.labels[:, None], 1.0)  # F.one_hot reads them on the host
        if batch.weights is None:
            return Batch(images, labels.lerp(_partners(labels), 1 - share))
        weights = batch.weights.lerp(_partners(batch.weights), 1 - share)
        if self.weighs_shares:
            labels = labels * batch.weights[:, None]
        labels = labels.lerp(_partners(labels), 1 - share)
        return Batch(images, labels / labels.sum(1, keepdim=True), weights)


def _partners(x: Tensor) -> Tensor:
    """Return each sample's neighbour, in `x`'s layout; a GPU's `roll` would transpose it first."""
    return torch.cat((x[-1:], x[:-1]))


def _box(share: float, x: float, y: float) -> tuple[tuple[float, float, float, float], float]:
    """Return (top, left, bottom, right) as shares of the sides, around (y, x), of area 1 - share before it is
    clipped to the image; and the share that stays."""
    half = math.sqrt(1 - share) / 2
    top, bottom = max(0.0, y - half), min(1.0, y + half)
    left, right = max(0.0, x - half), min(1.0, x + half)
    return (top, left, bottom, right), 1 - (bottom - top) * (right - left)


def _paste(x: Tensor, edges: Sequence[float]) -> Tensor:
    """Return `x` (N, 3, s, s) with the box of each sample's neighbour; edges at the nearest pixel."""
    top, left, bottom, right = (round(edge * x.shape[-1]) for edge in edges)
    mixed = x.clone(memory_format=torch.preserve_format)
    box = (..., slice(top, bottom), slice(left, right))
    mixed[box] = _partners(x[box])
    return mixed

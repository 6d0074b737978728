"""Probabilities that mean what they say: one temperature a size, and how far off confidences are."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# A network that is never wrong would have temperature 0, one worse than chance an infinite one.
LIMIT = 20.0

BINS = 15  # of Guo et al. 2017


def fit(logits: Tensor, labels: Tensor) -> float:
    """The temperature, from 1 / LIMIT to LIMIT, by which to divide logits for the least cross-entropy.

    logits: (N, classes) float32. labels: (N,) int64. (Guo et al. 2017: On Calibration of Modern Neural
    Networks, section 4.2.)
    """
    position = torch.zeros((), requires_grad=True)
    lbfgs = torch.optim.LBFGS([position], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        value = F.cross_entropy(logits / _temperature(position), labels)
        (position.grad,) = torch.autograd.grad(value, position)
        return value

    lbfgs.step(loss)  # type: ignore[no-untyped-call]
    return _temperature(position).item()


def _temperature(position: Tensor) -> Tensor:
    """Within the limits for any position; 1 at 0."""
    return (math.log(LIMIT) * position.tanh()).exp()


def expected_calibration_error(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """How far the share of right answers is from their probability, in points of %.

    Averaged over the images; both are of the images whose most likely class has a probability within one
    of 15 bins of [0, 1]. logits: (N, classes); labels: (N,).
    """
    confidence, answers = (logits / temperature).softmax(dim=1).max(dim=1)
    gap = confidence.double() - (answers == labels).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, gap)
    return 100 * sums.abs().sum().item() / len(labels)

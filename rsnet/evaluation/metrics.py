"""Figures of predictions: accuracies, calibration error, per-class accuracy, confusions, hard images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:  # of what no release needs
    from rsnet.evaluation.predictions import Predictions

BINS = 15  # of Guo et al. 2017


def calibration_error(confidence: Tensor, is_right: Tensor) -> float:
    """Return how far accuracy is from confidence, in percentage points, averaged over the images.

    Both are of the images whose most likely class has a probability within one of 15 bins of [0, 1].
    confidence, is_right: (N,). torchmetrics' puts a probability of exactly 1, which float32's softmax often
    gives, into a sixteenth bin.
    """
    gap = confidence.double() - is_right.double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, gap)
    return 100 * sums.abs().sum().item() / len(is_right)


def calibration_errors(predictions: Predictions) -> dict[str, float]:
    """Return the expected calibration error of each result, in percentage points."""
    right = torch.from_numpy(predictions.hits[:, :, 0])
    confidence = torch.from_numpy(predictions.probabilities[:, :, 0])
    return {
        name: calibration_error(confidence[:, i], right[:, i])
        for i, name in enumerate(predictions.names)
    }


def accuracies(predictions: Predictions) -> dict[str, dict[str, float]]:
    """Return top-1 and top-5 of each result, in %: an answer that is one of several labels is right."""
    hits = predictions.hits
    top1, top5 = 100 * hits[:, :, 0].mean(axis=0), 100 * hits.any(axis=2).mean(axis=0)
    return {
        name: {"top1": float(one), "top5": float(five)}
        for name, one, five in zip(predictions.names, top1, top5, strict=True)
    }


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy by class of the C outputs.

    images: (C,) images with that label. top1: (C, R) %, NaN for a class without images.
    """

    images: NDArray[np.int64]
    top1: NDArray[np.float64]


def class_accuracy(predictions: Predictions, num_classes: int) -> ClassAccuracy:
    """Count right answers by label; an image of several labels counts for each of them."""
    right = predictions.hits[:, :, 0]
    rows, columns = np.nonzero(predictions.labels >= 0)
    labels = predictions.labels[rows, columns]
    images = np.bincount(labels, minlength=num_classes)
    counts = np.stack(
        [np.bincount(labels, weights=of[rows], minlength=num_classes) for of in right.T], axis=1
    )
    with np.errstate(invalid="ignore"):
        return ClassAccuracy(images, 100 * counts / images[:, None])


@dataclass(frozen=True)
class Confusion:
    """The pairs of label and answer that occur, the most frequent confusion at the largest size first.

    labels, answers: (P,) outputs. counts: (P, R) images. images: (P,) images of that label.
    """

    labels: NDArray[np.int64]
    answers: NDArray[np.int64]
    counts: NDArray[np.int64]
    images: NDArray[np.int64]

    @property
    def wrong(self) -> NDArray[np.int64]:
        """The indices of the pairs that are confusions at the largest size, the most frequent first."""
        return np.flatnonzero((self.labels != self.answers) & (self.counts[:, 0] > 0))


def confusion(predictions: Predictions) -> Confusion:
    """Count label and answer of each image, which has one label, at each size.

    Counts the pairs that occur, not a matrix: of ImageNet-21k's classes one takes 4 GB for each size.
    """
    answers, labels = predictions.classes[:, :, 0], predictions.labels[:, 0]
    images, results = answers.shape
    each = np.column_stack([np.repeat(labels, results), answers.ravel()])
    pairs, place = np.unique(each, axis=0, return_inverse=True)
    cells = place.ravel() * results + np.tile(np.arange(results), images)
    counts = np.bincount(cells, minlength=len(pairs) * results).reshape(-1, results)
    of_label = dict(zip(*np.unique(labels, return_counts=True), strict=True))
    is_right = pairs[:, 0] == pairs[:, 1]
    order = np.lexsort((pairs[:, 1], pairs[:, 0], *-counts.T[::-1], is_right))
    label, answer = pairs[order].T
    return Confusion(label, answer, counts[order], np.array([of_label[one] for one in label]))


def wrong_at_every_size(predictions: Predictions) -> NDArray[np.int64]:
    """Return the indices of the images that no size classifies right, whatever the ensemble says."""
    return np.flatnonzero(~predictions.hits[:, :-1, 0].any(axis=1))


def right_only_when_small(predictions: Predictions) -> NDArray[np.int64]:
    """Return the indices of the images that are wrong at the largest size and right at a smaller one."""
    right = predictions.hits[:, :-1, 0]
    return np.flatnonzero(~right[:, 0] & right.any(axis=1))

"""Which cascade to take: those that no other beats in both accuracy and time, on labelled images.

An image's way through a cascade follows from its confidence at each size, so that cascades are simulated
exactly, without the network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rsnet.inference.cascade import Cascade, CascadeStage
from rsnet.inference.scores import LabelledLogits

# Thresholds that are tried at a size: the confidences that 1/128, 2/128, ... of the images are below.
GRID = 128
# What a millisecond is to be worth, in points of accuracy for the time of the slowest size.
PRICES = np.geomspace(0.1, 100, 24)
# All that five or six sizes make; of more sizes, the shorter ones.
MOST_LADDERS = 100
SWEEPS = 10

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """Of N images at each size, the smallest first.

    confidence: by size, (N,) probabilities of the most likely class. right: (N,), whether it is the label.
    """

    confidence: dict[int, Floats]
    right: dict[int, Floats]


class Outcome(NamedTuple):
    """A cascade's accuracy in %, and its milliseconds an image, on average."""

    ladder: Cascade
    top1: float
    ms: float


def answers(scores: LabelledLogits, temperatures: Mapping[int, float]) -> Answers:
    """What the cascade sees of the logits, divided by the temperatures."""
    confidence, right = {}, {}
    for size, logits in sorted(scores.logits.items()):
        best, classes = (logits / temperatures[size]).softmax(dim=1).max(dim=1)
        confidence[size] = best.double().numpy()
        right[size] = (classes == scores.labels).double().numpy()
    return Answers(confidence, right)


def simulate(found: Answers, ladder: Cascade, ms: Mapping[int, float]) -> Outcome:
    """ms: by size, what a forward takes, in milliseconds an image."""
    *smaller, last = ladder
    right, time = found.right[last.size], np.full_like(found.right[last.size], ms[last.size])
    for size, threshold in reversed(smaller):
        is_unsure = found.confidence[size] < threshold
        right = np.where(is_unsure, right, found.right[size])
        time = ms[size] + np.where(is_unsure, time, 0.0)
    return Outcome(ladder, 100 * float(right.mean()), float(time.mean()))


def shares(found: Answers, ladder: Cascade) -> dict[int, float]:
    """By size, the share of the images that it decides, in %."""
    left = np.ones_like(found.right[ladder[0].size], dtype=bool)
    decided = {}
    for size, threshold in ladder[:-1]:
        goes_on = left & (found.confidence[size] < threshold)
        decided[size] = 100 * float((left & ~goes_on).mean())
        left = goes_on
    return decided | {ladder[-1].size: 100 * float(left.mean())}


def best_size(found: Answers, ms: Mapping[int, float], limit: float) -> int | None:
    """The most accurate size that takes `limit` milliseconds an image at most; None if none does."""
    fitting = [size for size in ms if ms[size] <= limit]
    return max(fitting, key=lambda size: found.right[size].mean(), default=None)


def search(found: Answers, ms: Mapping[int, float]) -> list[Outcome]:
    """The cascades that no other one found beats, from the fastest to the most accurate.

    Single sizes are among them, and cascades that leave out some sizes. For each choice of sizes, and
    each worth of a millisecond, one threshold after the other takes the best of its grid until none moves;
    all that was tried on the way counts.
    """
    frontier: list[Outcome] = []
    for sizes in _choices(sorted(ms)):
        frontier = _unbeaten([*frontier, *_Search(found, ms, sizes).run()])
    return frontier


def _choices(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    count = 0
    for length in range(1, len(sizes) + 1):
        count += math.comb(len(sizes), length)
        if length <= 2 or count <= MOST_LADDERS:
            yield from itertools.combinations(sizes, length)


class _Search:
    """Thresholds for one choice of sizes."""

    def __init__(self, found: Answers, ms: Mapping[int, float], sizes: tuple[int, ...]) -> None:
        self._sizes = sizes
        self._confidence = [found.confidence[s] for s in sizes]
        self._right = [found.right[s] for s in sizes]
        self._ms = [ms[s] for s in sizes]
        self._order = [np.argsort(c) for c in self._confidence]
        shares_ = np.arange(1, GRID + 1) / GRID
        self._grid = [np.unique(np.quantile(c, shares_)) for c in self._confidence]
        self._below = [
            np.searchsorted(c[o], g)
            for c, o, g in zip(self._confidence, self._order, self._grid, strict=True)
        ]
        self._price = 1 / max(ms.values())

    def run(self) -> Iterator[Outcome]:
        levels = range(len(self._sizes) - 1)
        thresholds = [float(self._grid[k][len(self._grid[k]) // 2]) for k in levels]
        if not levels:
            yield Outcome(
                (CascadeStage(self._sizes[0]),), 100 * float(self._right[0].mean()), self._ms[0]
            )
        for price in PRICES * self._price:
            for _ in range(SWEEPS):
                before = list(thresholds)
                for k in levels:
                    top1, ms = self._line(k, thresholds)
                    yield from self._outcomes(k, thresholds, top1, ms)
                    thresholds[k] = float(self._grid[k][np.argmax(top1 - price * ms)])
                if thresholds == before:
                    break

    def _line(self, level: int, thresholds: Sequence[float]) -> tuple[Floats, Floats]:
        """Accuracy in % and ms an image for each threshold of a level's grid, the others as they are."""
        reached = np.ones(len(self._right[0]), dtype=bool)
        right, ms = 0.0, self._ms[0] * len(reached)
        for k in range(level):
            stops = reached & (self._confidence[k] >= thresholds[k])
            right += self._right[k][stops].sum()
            reached &= ~stops
            ms += self._ms[k + 1] * reached.sum()
        right += self._right[level][reached].sum()
        # What is won, and what it takes, if an image goes on.
        later_right, later_ms = self._right[-1], np.full(len(reached), self._ms[-1])
        for k in range(len(self._sizes) - 2, level, -1):
            goes_on = self._confidence[k] < thresholds[k]
            later_right = np.where(goes_on, later_right, self._right[k])
            later_ms = self._ms[k] + np.where(goes_on, later_ms, 0.0)
        order, below = self._order[level], self._below[level]
        won = np.cumsum(np.append(0.0, (reached * (later_right - self._right[level]))[order]))
        spent = np.cumsum(np.append(0.0, (reached * later_ms)[order]))
        return 100 * (right + won[below]) / len(reached), (ms + spent[below]) / len(reached)

    def _outcomes(
        self, level: int, thresholds: Sequence[float], top1: Floats, ms: Floats
    ) -> Iterator[Outcome]:
        """Those of a line that no other of it beats."""
        for i in _unbeaten_rows(top1, ms):
            tried = [
                *thresholds[:level],
                float(self._grid[level][i]),
                *thresholds[level + 1 :],
                0.0,
            ]
            ladder = tuple(CascadeStage(s, t) for s, t in zip(self._sizes, tried, strict=True))
            yield Outcome(ladder, float(top1[i]), float(ms[i]))


def _unbeaten(outcomes: Sequence[Outcome]) -> list[Outcome]:
    top1, ms = (np.array([getattr(o, name) for o in outcomes]) for name in ("top1", "ms"))
    return [outcomes[i] for i in _unbeaten_rows(top1, ms)]


def _unbeaten_rows(top1: Floats, ms: Floats) -> NDArray[np.int64]:
    """Rows, the fastest first, that are more accurate than all faster ones."""
    order = np.lexsort((-top1, ms))
    ranked = top1[order]
    best_before = np.maximum.accumulate(np.append(-np.inf, ranked[:-1]))
    return order[ranked > best_before + 1e-9]

"""Search for cascades that no other beats in both accuracy and time, on labelled images; `rsnet tune`.

An image's way through a cascade follows from its confidence at each size, so that cascades are simulated
exactly, without the network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.utils.errors import DataError
from rsnet.inference.calibration import (
    LabelledLogits,
    expected_calibration_error,
    fit_temperature,
)
from rsnet.inference.cascade import Cascade, CascadeStage, Tuned, write_tuned
from rsnet.inference.classifier import SwitchableClassifier

# Thresholds that are tried at a size: the confidences that 1/128, 2/128, ... of the images are below.
GRID = 128
# Exchange rates of time and accuracy that are tried, in points of accuracy for the slowest size's time.
PRICES = np.geomspace(0.1, 100, 24)
# Choices of sizes: all that five or six make; of more sizes, the shorter ones.
MAX_CASCADES = 100
SWEEPS = 10
RESAMPLES = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """Answers to N images at each size, the smallest first.

    confidence: by size, (N,) probabilities of the most likely class. right: (N,), 1 where it is the label.
    """

    confidence: dict[int, Floats]
    right: dict[int, Floats]


class Outcome(NamedTuple):
    """A cascade's top-1 accuracy in %, and its milliseconds an image, on average."""

    cascade: Cascade
    top1: float
    ms: float


class Interval(NamedTuple):
    """Bounds (low, high) of top-1 in % and of milliseconds per image."""

    top1: tuple[float, float]
    ms: tuple[float, float]


def answers(scores: LabelledLogits, temperatures: Mapping[int, float]) -> Answers:
    """Return what a cascade sees of the logits, divided by the temperatures."""
    confidence, right = {}, {}
    for size, logits in sorted(scores.logits.items()):
        best, classes = (logits / temperatures[size]).softmax(dim=1).max(dim=1)
        confidence[size] = best.double().numpy()
        right[size] = (classes == scores.labels).double().numpy()
    return Answers(confidence, right)


def simulate(found: Answers, cascade: Cascade, ms: Mapping[int, float]) -> Outcome:
    """Return a cascade's accuracy and time. ms: by size, milliseconds an image of a forward."""
    right, time = _by_image(found, cascade, ms)
    return Outcome(cascade, 100 * float(right.mean()), float(time.mean()))


def _by_image(found: Answers, cascade: Cascade, ms: Mapping[int, float]) -> tuple[Floats, Floats]:
    """Return (N,) whether a cascade's answer is right, 1 or 0, and the milliseconds that it took."""
    *smaller, last = cascade
    right, time = found.right[last.size], np.full_like(found.right[last.size], ms[last.size])
    for size, threshold in reversed(smaller):
        is_unsure = found.confidence[size] < threshold
        right = np.where(is_unsure, right, found.right[size])
        time = ms[size] + np.where(is_unsure, time, 0.0)
    return right, time


def undominated(
    found: Answers, cascade: Cascade, others: Iterable[Cascade], ms: Mapping[int, float]
) -> Outcome:
    """Return the outcome of `cascade`, or of one that beats it and that none of the others beats.

    One beats another if it is as accurate and as fast, and not equal.
    """
    chosen = simulate(found, cascade, ms)
    for other in (simulate(found, c, ms) for c in others):
        no_worse = other.top1 >= chosen.top1 and other.ms <= chosen.ms
        if no_worse and other[1:] != chosen[1:]:
            chosen = other
    return chosen


def interval(found: Answers, cascade: Cascade, ms: Mapping[int, float]) -> Interval:
    """Return what top-1 and time would be of other images of the kind: 95 % of RESAMPLES bootstrap samples.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), section 13.3, percentile intervals.
    """
    right, time = _by_image(found, cascade, ms)
    rng = np.random.default_rng(0)
    means = np.array(
        [
            (100 * right[drawn].mean(), time[drawn].mean())
            for drawn in (rng.integers(len(right), size=len(right)) for _ in range(RESAMPLES))
        ]
    )
    (low, high) = np.percentile(means, [2.5, 97.5], axis=0)
    return Interval((float(low[0]), float(high[0])), (float(low[1]), float(high[1])))


def shares(found: Answers, cascade: Cascade) -> dict[int, float]:
    """Return, by size, the share of the images that it decides, in %."""
    left = np.ones_like(found.right[cascade[0].size], dtype=bool)
    decided = {}
    for size, threshold in cascade[:-1]:
        goes_on = left & (found.confidence[size] < threshold)
        decided[size] = 100 * float((left & ~goes_on).mean())
        left = goes_on
    return decided | {cascade[-1].size: 100 * float(left.mean())}


def best_size(found: Answers, ms: Mapping[int, float], limit: float) -> int | None:
    """Return the most accurate size that takes at most `limit` ms an image; None if none does."""
    fitting = [size for size in ms if ms[size] <= limit]
    return max(fitting, key=lambda size: found.right[size].mean(), default=None)


def search(found: Answers, ms: Mapping[int, float]) -> list[Outcome]:
    """Return the cascades that no other one found beats, from the fastest to the most accurate.

    Single sizes are among them, and cascades that leave out some sizes. Coordinate descent: for each choice
    of sizes and each of PRICES, one threshold after the other takes the best of its grid until none moves;
    all that was tried on the way counts.
    """
    frontier: list[Outcome] = []
    for sizes in _choices(sorted(ms)):
        frontier = _pareto_front([*frontier, *_Search(found, ms, sizes).run()])
    return frontier


def _choices(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    count = 0
    for length in range(1, len(sizes) + 1):
        count += math.comb(len(sizes), length)
        if length <= 2 or count <= MAX_CASCADES:
            yield from itertools.combinations(sizes, length)


class _Search:
    """Coordinate descent on the thresholds of one choice of sizes."""

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
        stages = range(len(self._sizes) - 1)
        thresholds = [float(self._grid[k][len(self._grid[k]) // 2]) for k in stages]
        if not stages:
            yield Outcome(
                (CascadeStage(self._sizes[0]),), 100 * float(self._right[0].mean()), self._ms[0]
            )
        for price in PRICES * self._price:
            for _ in range(SWEEPS):
                before = list(thresholds)
                for k in stages:
                    top1, ms = self._line(k, thresholds)
                    yield from self._outcomes(k, thresholds, top1, ms)
                    thresholds[k] = float(self._grid[k][np.argmax(top1 - price * ms)])
                if thresholds == before:
                    break

    def _line(self, stage: int, thresholds: Sequence[float]) -> tuple[Floats, Floats]:
        """Return accuracy in % and ms an image for each threshold of a stage's grid, the others fixed."""
        reached, right, ms = self._up_to(stage, thresholds)
        later_right, later_ms = self._after(stage, thresholds)
        # With the images in the order of their confidence, a threshold sends the first n of them on: the
        # n-th entry of a cumulative sum is what that changes.
        order, n_below = self._order[stage], self._below[stage]
        gained = np.cumsum(np.append(0.0, (reached * (later_right - self._right[stage]))[order]))
        spent = np.cumsum(np.append(0.0, (reached * later_ms)[order]))
        images = len(reached)
        return 100 * (right + gained[n_below]) / images, (ms + spent[n_below]) / images

    def _up_to(
        self, stage: int, thresholds: Sequence[float]
    ) -> tuple[NDArray[np.bool_], float, float]:
        """Return (N,) whether an image reaches `stage`, and total right answers and ms if all end there."""
        reached = np.ones(len(self._right[0]), dtype=bool)
        right, ms = 0.0, self._ms[0] * len(reached)
        for k in range(stage):
            stops = reached & (self._confidence[k] >= thresholds[k])
            right += self._right[k][stops].sum()
            reached &= ~stops
            ms += self._ms[k + 1] * reached.sum()
        return reached, right + self._right[stage][reached].sum(), ms

    def _after(self, stage: int, thresholds: Sequence[float]) -> tuple[Floats, Floats]:
        """Return (N,) right answers, and ms, of each image if it goes on from `stage` to the next one."""
        right, ms = self._right[-1], np.full(len(self._right[0]), self._ms[-1])
        for k in range(len(self._sizes) - 2, stage, -1):
            goes_on = self._confidence[k] < thresholds[k]
            right = np.where(goes_on, right, self._right[k])
            ms = self._ms[k] + np.where(goes_on, ms, 0.0)
        return right, ms

    def _outcomes(
        self, stage: int, thresholds: Sequence[float], top1: Floats, ms: Floats
    ) -> Iterator[Outcome]:
        """Yield the outcomes of a line that no other of it beats."""
        for i in _pareto_rows(top1, ms):
            tried = [
                *thresholds[:stage],
                float(self._grid[stage][i]),
                *thresholds[stage + 1 :],
                0.0,
            ]
            cascade = tuple(CascadeStage(s, t) for s, t in zip(self._sizes, tried, strict=True))
            yield Outcome(cascade, float(top1[i]), float(ms[i]))


def _pareto_front(outcomes: Sequence[Outcome]) -> list[Outcome]:
    top1, ms = (np.array([getattr(o, name) for o in outcomes]) for name in ("top1", "ms"))
    return [outcomes[i] for i in _pareto_rows(top1, ms)]


def _pareto_rows(top1: Floats, ms: Floats) -> NDArray[np.int64]:
    """Return the rows, the fastest first, that are more accurate than all faster ones."""
    order = np.lexsort((-top1, ms))
    ranked = top1[order]
    best_before = np.maximum.accumulate(np.append(-np.inf, ranked[:-1]))
    return order[ranked > best_before + 1e-9]


@dataclass(frozen=True)
class TunedSize:
    """A size on held-out images. top1, ece (expected calibration error), tuned_ece: in %; ms an image."""

    size: int
    top1: float
    ms: float
    temperature: float
    ece: float
    tuned_ece: float


@dataclass(frozen=True)
class TuneResult:
    """Result of `tune_release`.

    fitted, held_out: the cascade on the half of the images that it was fitted to, and on the other one.
    interval: between what the latter would be on other images of the kind.
    shares: by size, % of the held-out images that it decides. best_size: the most accurate single size that
    is as fast; None if there is none.
    """

    tuned: Tuned
    fitted: Outcome
    held_out: Outcome
    interval: Interval
    fitted_images: int
    held_out_images: int
    sizes: list[TunedSize]
    shares: dict[int, float]
    best_size: TunedSize | None


def tune_release(
    classifier: SwitchableClassifier,
    scores: LabelledLogits,
    target_top1: float | None = None,
    target_ms: float | None = None,
) -> TuneResult:
    """Fit one temperature a size and a cascade to half of the images, and write the release's tuned.json.

    target_top1: accuracy in %, for the fastest cascade that has it. target_ms: else milliseconds an image,
    in full batches, for the most accurate cascade that takes no more. If, on the other half, a size or
    another of the cascades found is as accurate and as fast, or better, that is taken instead.

    Raises DataError, which says what can be had, if no cascade meets the target; OSError if the file cannot
    be written.
    """
    fitted, other = scores.halves()
    temperatures = {s: fit_temperature(z, fitted.labels) for s, z in fitted.logits.items()}
    ms = classifier.ms_per_image()
    fitted_to = answers(fitted, temperatures)
    frontier = search(fitted_to, ms)
    try:
        chosen = choose(frontier, target_top1, target_ms)
    except DataError as error:
        advice = "" if target_ms is None else classifier.remeasure_advice()
        raise DataError(f"{error}{advice}") from error
    held_out = answers(other, temperatures)
    singles: list[Cascade] = [(CascadeStage(size),) for size in ms]
    others = [*(outcome.cascade for outcome in frontier), *singles]
    reported = undominated(held_out, chosen.cascade, others, ms)
    chosen = simulate(fitted_to, reported.cascade, ms)
    sizes = [
        TunedSize(
            size=size,
            top1=100 * float(held_out.right[size].mean()),
            ms=ms[size],
            temperature=t,
            ece=expected_calibration_error(other.logits[size], other.labels),
            tuned_ece=expected_calibration_error(other.logits[size], other.labels, t),
        )
        for size, t in temperatures.items()
    ]
    best = best_size(held_out, ms, reported.ms)
    result = TuneResult(
        tuned=Tuned(temperatures, chosen.cascade),
        fitted=chosen,
        held_out=reported,
        interval=interval(held_out, reported.cascade, ms),
        fitted_images=len(fitted.labels),
        held_out_images=len(other.labels),
        sizes=sizes,
        shares=shares(held_out, chosen.cascade),
        best_size=next((s for s in sizes if s.size == best), None),
    )
    _write_result(classifier, result, {"top1": target_top1, "ms": target_ms})
    return result


def _write_result(
    classifier: SwitchableClassifier, result: TuneResult, target: Mapping[str, float | None]
) -> None:
    """Write tuned.json of the release."""
    conditions = classifier.conditions
    fitted, held_out, within = result.fitted, result.held_out, result.interval
    notes = {
        "target": target,
        "fitted": {"images": result.fitted_images, "top1": fitted.top1, "ms": fitted.ms},
        "held_out": {
            "images": result.held_out_images,
            "top1": held_out.top1,
            "ms": held_out.ms,
            "interval": {"top1": list(within.top1), "ms": list(within.ms)},
        },
        "conditions": conditions,
    }
    found = classifier.release
    write_tuned(found.folder, conditions["sha256"], result.tuned, notes, found.prefix)


def choose(
    frontier: Sequence[Outcome], target_top1: float | None, target_ms: float | None
) -> Outcome:
    """Return the outcome of a search, sorted by time, that meets the target; see `tune_release`.

    Raises DataError, which says what can be had, if none does.
    """
    fastest, best = frontier[0], frontier[-1]
    if target_top1 is not None:
        accurate = [outcome for outcome in frontier if outcome.top1 >= target_top1]
        if not accurate:
            raise DataError(
                f"no cascade has a top-1 of {target_top1:g} %: the best has {best.top1:.2f} %,"
                f" at {best.ms:.4g} ms an image"
            )
        return accurate[0]
    assert target_ms is not None
    within = [outcome for outcome in frontier if outcome.ms <= target_ms]
    if not within:
        raise DataError(
            f"no cascade takes {target_ms:g} ms an image: the fastest takes {fastest.ms:.4g},"
            f" with a top-1 of {fastest.top1:.2f} %"
        )
    return within[-1]

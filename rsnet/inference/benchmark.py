"""What bench measures: each size's accuracy, calibration, speed and memory, and cascades of the sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pipelines.utils.errors import UsageError
from rsnet.inference import cascade_search as thresholds
from rsnet.inference import latency, memory
from rsnet.inference.calibration import expected_calibration_error
from rsnet.inference.cascade import Cascade, CascadeStage
from rsnet.inference.cascade_search import Answers
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.inference.scores import LabelledLogits
from rsnet.inference.tuned import Tuned

# p99 of 40 would be the slowest alone.
REPEATS = {"one": 200, "batch": 100}

PERCENTILES = (50, 95, 99)

CONFIDENCES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)

# By "p50", "p95" and "p99": milliseconds of a batch.
Times = dict[str, float]


@dataclass(frozen=True)
class SizeFigures:
    """A size on this device.

    gflops: an image's. top1, top5, ece (calibration error): in %.
    tuned_ece: ece with the temperature in tuned.json, of the images that it was not fitted to; or None.
    ms_one, ms_batch: of one image and of a whole batch, from pixels on the host to probabilities there.
    peak_mb: of a batch's forward, beside the weights.
    """

    size: int
    gflops: float
    top1: float
    top5: float
    ece: float
    tuned_ece: float | None
    ms_one: Times
    ms_batch: Times
    images_per_s: float
    peak_mb: float


@dataclass(frozen=True)
class CascadeFigures:
    """how: "size", "confidence" (the same for all sizes), "searched" or "tuned".

    ladder: sizes and thresholds. top1: in %. ms: an image on average, in full batches. shares: by size, % of
    the images that it decides.
    """

    how: str
    ladder: Cascade
    top1: float
    ms: float
    shares: dict[int, float]


@dataclass(frozen=True)
class Figures:
    """conditions: device, batch size and so on. churn[a][b]: % of the images whose answers differ.

    cascades: on `held_out` of the `images`.
    """

    conditions: dict[str, Any]
    images: int
    held_out: int
    sizes: list[SizeFigures]
    churn: dict[int, dict[int, float]]
    cascades: list[CascadeFigures]


def measure(classifier: SwitchableClassifier, scores: LabelledLogits) -> Figures:
    """Times and memory are measured anew. Raises DataError for a damaged tuned.json."""
    tuned = _tuned(classifier)
    times = {
        kind: latency.sample(classifier.blank_forward(images), classifier.sizes, REPEATS[kind])
        for kind, images in (("one", 1), ("batch", classifier.batch_size))
    }
    fitted, other = scores.halves()
    sizes = [_size(classifier, scores, s, times) for s in classifier.sizes]
    if tuned is not None:
        sizes = [
            replace(f, tuned_ece=_ece(other, f.size, tuned.temperatures[f.size])) for f in sizes
        ]
    ms = {figures.size: figures.ms_batch["p50"] / classifier.batch_size for figures in sizes}
    return Figures(
        classifier.conditions,
        len(scores.labels),
        len(other.labels),
        sizes,
        churn(scores),
        cascades(fitted, other, ms, tuned),
    )


def churn(scores: LabelledLogits) -> dict[int, dict[int, float]]:
    """% of the images whose most likely classes at two sizes are not the same."""
    answers = {size: logits.argmax(dim=1) for size, logits in scores.logits.items()}
    return {
        a: {b: 100 * (one != other).double().mean().item() for b, other in answers.items()}
        for a, one in answers.items()
    }


def cascades(
    fitted: LabelledLogits, other: LabelledLogits, ms: Mapping[int, float], tuned: Tuned | None
) -> list[CascadeFigures]:
    """Figures of `other`. What is searched are cascades that no other beats on `fitted`."""
    as_they_are = dict.fromkeys(ms, 1.0)
    held_out = thresholds.answers(other, as_they_are)
    ascending = sorted(ms)
    found = [_cascade("size", held_out, (CascadeStage(size),), ms) for size in ascending]
    for confidence in CONFIDENCES:
        ladder = tuple(CascadeStage(size, confidence) for size in ascending)
        found.append(_cascade("confidence", held_out, ladder, ms))
    for outcome in thresholds.search(thresholds.answers(fitted, as_they_are), ms):
        found.append(_cascade("searched", held_out, outcome.ladder, ms))
    if tuned is not None:
        calibrated = thresholds.answers(other, tuned.temperatures)
        found.append(_cascade("tuned", calibrated, tuned.ladder, ms))
    return found


def _cascade(
    how: str, answers: Answers, ladder: Cascade, ms: Mapping[int, float]
) -> CascadeFigures:
    outcome = thresholds.simulate(answers, ladder, ms)
    return CascadeFigures(how, ladder, outcome.top1, outcome.ms, thresholds.shares(answers, ladder))


def _tuned(classifier: SwitchableClassifier) -> Tuned | None:
    try:
        return classifier.tuned()
    except UsageError:  # there is none
        return None


def _size(
    classifier: SwitchableClassifier,
    scores: LabelledLogits,
    size: int,
    times: Mapping[str, Mapping[int, list[float]]],
) -> SizeFigures:
    logits, labels = scores.logits[size], scores.labels
    one, batch = (
        {f"p{p}": latency.percentile(times[kind][size], p) for p in PERCENTILES}
        for kind in ("one", "batch")
    )
    forward = classifier.blank_forward(classifier.batch_size)
    return SizeFigures(
        size=size,
        gflops=classifier.config["gflops"][str(size)],
        top1=_accuracy(logits, labels, 1),
        top5=_accuracy(logits, labels, 5),
        ece=_ece(scores, size),
        tuned_ece=None,
        ms_one=one,
        ms_batch=batch,
        images_per_s=1000 * classifier.batch_size / batch["p50"],
        peak_mb=memory.peak_bytes(lambda: forward(size), classifier.device) / 1e6,
    )


def _ece(scores: LabelledLogits, size: int, temperature: float = 1.0) -> float:
    return expected_calibration_error(scores.logits[size], scores.labels, temperature)


def _accuracy(logits: Tensor, labels: Tensor, top: int) -> float:
    """% of the images whose label is among the `top` most likely classes."""
    best = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).double().mean().item()

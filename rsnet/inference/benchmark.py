"""Benchmark of a release: each size's accuracy, calibration, speed and memory, and cascades of the sizes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pipelines.utils.errors import UsageError
from rsnet.inference import cascade_search, latency
from rsnet.inference.calibration import LabelledLogits, expected_calibration_error
from rsnet.inference.cascade import Cascade, CascadeStage, Tuned
from rsnet.inference.cascade_search import Answers
from rsnet.inference.classifier import SwitchableClassifier

# p99 of 40 would be the slowest alone.
REPEATS = {"one": 200, "batch": 100}

PERCENTILES = (50, 95, 99)

CONFIDENCES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)

# By "p50", "p95" and "p99": milliseconds of a batch.
Times = dict[str, float]


@dataclass(frozen=True)
class SizeFigures:
    """Figures of a size on this device.

    gmacs: an image's. top1, top5, ece (calibration error): in %.
    tuned_ece: ece with the temperature in tuned.json, of the images that it was not fitted to; or None.
    ms_one, ms_batch: of one image and of a whole batch, from pixels on the host to probabilities there.
    peak_mb: of a batch's forward, beside the weights; None where torch does not allocate it.
    """

    size: int
    gmacs: float
    top1: float
    top5: float
    ece: float
    tuned_ece: float | None
    ms_one: Times
    ms_batch: Times
    images_per_s: float
    peak_mb: float | None


@dataclass(frozen=True)
class CascadeFigures:
    """Figures of a cascade on held-out images.

    how: "size", "confidence" (the same for all sizes), "searched" or "tuned". top1: in %. ms: an image on
    average, in full batches. shares: by size, % of the images that it decides.
    """

    how: str
    cascade: Cascade
    top1: float
    ms: float
    shares: dict[int, float]


@dataclass(frozen=True)
class Figures:
    """All figures of a release on this device.

    conditions: device, batch size and so on. churn[a][b]: % of the images whose answers differ.
    cascades: on `held_out` of the `images`.
    """

    conditions: dict[str, Any]
    images: int
    held_out: int
    sizes: list[SizeFigures]
    churn: dict[int, dict[int, float]]
    cascades: list[CascadeFigures]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of bench.json; "ladder" is the name that version 0.1 had for a cascade."""
        values = asdict(self)
        for one in values["cascades"]:
            one["ladder"] = one["cascade"]
        return values


def measure(classifier: SwitchableClassifier, scores: LabelledLogits) -> Figures:
    """Measure a release, times and memory included. Raises DataError for a damaged tuned.json."""
    tuned = tuned_of(classifier)
    times = {
        kind: latency.sample(classifier.blank_forward(images), classifier.sizes, REPEATS[kind])
        for kind, images in (("one", 1), ("batch", classifier.batch_size))
    }
    fitted, other = scores.halves()
    sizes = [
        _size(
            classifier, scores, s, times,
            tuned_ece=None if tuned is None else _ece(other, s, tuned.temperatures[s]),
        )
        for s in classifier.sizes
    ]  # fmt: skip
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
    """Return the % of the images whose most likely classes at two sizes are not the same."""
    answers = {size: logits.argmax(dim=1) for size, logits in scores.logits.items()}
    return {
        a: {b: 100 * (one != other).double().mean().item() for b, other in answers.items()}
        for a, one in answers.items()
    }


def cascades(
    fitted: LabelledLogits, other: LabelledLogits, ms: Mapping[int, float], tuned: Tuned | None
) -> list[CascadeFigures]:
    """Return figures on `other`; the search is for cascades that no other beats on `fitted`."""
    as_they_are = dict.fromkeys(ms, 1.0)
    held_out = cascade_search.answers(other, as_they_are)
    ascending = sorted(ms)
    found = [_cascade_figures("size", held_out, (CascadeStage(size),), ms) for size in ascending]
    for confidence in CONFIDENCES:
        cascade = tuple(CascadeStage(size, confidence) for size in ascending)
        found.append(_cascade_figures("confidence", held_out, cascade, ms))
    for outcome in cascade_search.search(cascade_search.answers(fitted, as_they_are), ms):
        found.append(_cascade_figures("searched", held_out, outcome.cascade, ms))
    if tuned is not None:
        calibrated = cascade_search.answers(other, tuned.temperatures)
        found.append(_cascade_figures("tuned", calibrated, tuned.cascade, ms))
    return found


def _cascade_figures(
    how: str, answers: Answers, cascade: Cascade, ms: Mapping[int, float]
) -> CascadeFigures:
    outcome = cascade_search.simulate(answers, cascade, ms)
    return CascadeFigures(
        how, cascade, outcome.top1, outcome.ms, cascade_search.shares(answers, cascade)
    )


def tuned_of(classifier: SwitchableClassifier) -> Tuned | None:
    """Return what `rsnet tune` found for a release, None if it has not been. Raises DataError."""
    try:
        return classifier.tuned()
    except UsageError:  # there is none
        return None


def _size(
    classifier: SwitchableClassifier,
    scores: LabelledLogits,
    size: int,
    times: Mapping[str, Mapping[int, list[float]]],
    tuned_ece: float | None,
) -> SizeFigures:
    logits, labels = scores.logits[size], scores.labels
    one, batch = (
        {f"p{p}": latency.percentile(times[kind][size], p) for p in PERCENTILES}
        for kind in ("one", "batch")
    )
    forward = classifier.blank_forward(classifier.batch_size)
    return SizeFigures(
        size=size,
        gmacs=classifier.config["gmacs"][str(size)],
        top1=_accuracy(logits, labels, 1),
        top5=_accuracy(logits, labels, 5),
        ece=_ece(scores, size),
        tuned_ece=tuned_ece,
        ms_one=one,
        ms_batch=batch,
        images_per_s=1000 * classifier.batch_size / batch["p50"],
        peak_mb=peak_bytes(lambda: forward(size), classifier.device) / 1e6
        if classifier.allocates
        else None,
    )


def _ece(scores: LabelledLogits, size: int, temperature: float = 1.0) -> float:
    return expected_calibration_error(scores.logits[size], scores.labels, temperature)


def _accuracy(logits: Tensor, labels: Tensor, top: int) -> float:
    """Return the % of the images whose label is among the `top` most likely classes."""
    best = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).double().mean().item()


def peak_bytes(computation: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors allocated at once while `computation` runs, beyond those before.

    Libraries' own memory is left out. On a GPU other threads' tensors count, too.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        computation()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Without it, Kineto logs its start, its stop, and that there is no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # acc_events: see `rsnet.profiler.run`.
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        computation()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    return int(max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]"))

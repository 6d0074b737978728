"""`python -m rsnet tune`: calibrated probabilities, and a cascade that meets a target, for a release."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from pipelines.utils.errors import DataError, UsageError
from rsnet.inference import calibration as temperature
from rsnet.inference import cascade_search as thresholds
from rsnet.inference import scores, tuned
from rsnet.inference.cascade import Cascade
from rsnet.inference.cascade_search import Answers, Outcome
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.inference.scores import LabelledLogits


@dataclass(frozen=True)
class Options:
    """Fit one temperature a size and a cascade's thresholds to labelled images, for predict --tuned.

    Half of the images, drawn by chance, is fitted to; what is printed is of the other half. The result
    is DIR/tuned.json, in place of an earlier one. Exit code 1 if the target cannot be met.
    """

    release: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Folder that `python -m rsnet release` wrote."""

    data: Annotated[Path, arg(aliases=("-d",), metavar="VAL")]
    """Folder with one folder of images per class, or one whose val/ is that."""

    target_top1: Annotated[float | None, arg(metavar="PERCENT")] = None
    """Accuracy: the fastest cascade that has it."""

    target_ms: float | None = None
    """Milliseconds an image on average, in full batches: the most accurate cascade that takes no more."""

    device: str | None = None
    """cpu, cuda, cuda:1, ... Unset: the GPU if there is one."""

    batch_size: int = 32
    """Images that are computed at once, and for which latencies hold."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in."""

    def __post_init__(self) -> None:
        if (self.target_top1 is None) == (self.target_ms is None):
            raise UsageError("--target-top1, --target-ms: give one of the two")
        if self.target_top1 is not None and not 0 <= self.target_top1 <= 100:
            raise UsageError(f"--target-top1 {self.target_top1}: must be a percentage")
        if self.target_ms is not None and not self.target_ms > 0:
            raise UsageError(f"--target-ms {self.target_ms}: must be above 0")


def run(options: Options) -> int:
    classifier = SwitchableClassifier.load(
        options.release,
        options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=torch.bfloat16 if options.dtype == "bfloat16" else None,
        batch_size=options.batch_size,
    )
    folder = scores.find(options.data, classifier.config["network"])
    if not os.access(options.release, os.W_OK):
        raise UsageError(f"cannot write into {options.release}, where {tuned.NAME} belongs")
    fitted, other = scores.collect(classifier, folder).halves()
    temperatures = {s: temperature.fit(z, fitted.labels) for s, z in fitted.logits.items()}
    ms = classifier.ms_per_image()
    found = thresholds.answers(fitted, temperatures)
    chosen = _choose(thresholds.search(found, ms), options)
    held_out = thresholds.answers(other, temperatures)
    reported = thresholds.simulate(held_out, chosen.ladder, ms)
    conditions = classifier.conditions
    notes = {
        "target": {"top1": options.target_top1, "ms": options.target_ms},
        "fitted": {"images": len(fitted.labels), "top1": chosen.top1, "ms": chosen.ms},
        "held_out": {"images": len(other.labels), "top1": reported.top1, "ms": reported.ms},
        "conditions": conditions,
    }
    tuned.write(
        options.release, conditions["sha256"], tuned.Tuned(temperatures, chosen.ladder), notes
    )
    print(
        f"{len(other.labels)} images, others than the {len(fitted.labels)} that were fitted to; ",
        end="",
    )
    print(f"{conditions['device']}, batches of {classifier.batch_size}, {options.dtype}")
    _print_sizes(other, held_out, temperatures, ms)
    _print_cascade(chosen, reported, held_out, ms)
    if options.target_top1 is not None and reported.top1 < options.target_top1:
        print(f"note: that is below {options.target_top1:g} %; more images would fit it better")
    print(f"{options.release / tuned.NAME}: {_shown(chosen.ladder)}")
    return 0


def _choose(frontier: Sequence[Outcome], options: Options) -> Outcome:
    """Raises DataError, which says what can be had, if none meets the target."""
    fastest, best = frontier[0], frontier[-1]
    if options.target_top1 is not None:
        fine = [outcome for outcome in frontier if outcome.top1 >= options.target_top1]
        if not fine:
            raise DataError(
                f"no cascade has a top-1 of {options.target_top1:g} %: the best has {best.top1:.2f} %,"
                f" at {best.ms:.4g} ms an image"
            )
        return fine[0]
    assert options.target_ms is not None
    within = [outcome for outcome in frontier if outcome.ms <= options.target_ms]
    if not within:
        raise DataError(
            f"no cascade takes {options.target_ms:g} ms an image: the fastest takes {fastest.ms:.4g},"
            f" with a top-1 of {fastest.top1:.2f} %"
        )
    return within[-1]


def _print_sizes(
    other: LabelledLogits,
    held_out: Answers,
    temperatures: Mapping[int, float],
    ms: Mapping[int, float],
) -> None:
    print(
        f"{'size':>6} {'top-1 %':>8} {'ms':>8} {'temperature':>12} {'ECE %, before':>14} {'after':>6}"
    )
    for size, value in temperatures.items():
        logits, top1 = other.logits[size], 100 * held_out.right[size].mean()
        before, after = (
            temperature.expected_calibration_error(logits, other.labels, t) for t in (1.0, value)
        )
        print(f"{size:6} {top1:8.2f} {ms[size]:8.4f} {value:12.3f} {before:14.2f} {after:6.2f}")


def _print_cascade(
    chosen: Outcome, reported: Outcome, held_out: Answers, ms: Mapping[int, float]
) -> None:
    print(f"{'':24} {'top-1 %':>8} {'ms':>8}   % that each size decides")
    decided = ", ".join(
        f"{size}: {share:.1f}" for size, share in thresholds.shares(held_out, chosen.ladder).items()
    )
    print(f"{'cascade, where fitted':24} {chosen.top1:8.2f} {chosen.ms:8.4f}")
    print(f"{'cascade':24} {reported.top1:8.2f} {reported.ms:8.4f}   {decided}")
    size = thresholds.best_size(held_out, ms, reported.ms)
    if size is not None:
        name = f"best size as fast: {size}"
        print(f"{name:24} {100 * held_out.right[size].mean():8.2f} {ms[size]:8.4f}")


def _shown(ladder: Cascade) -> str:
    *smaller, last = ladder
    steps = "".join(f"{size}, below {threshold:.3f} " for size, threshold in smaller)
    return f"{steps}{last.size}"

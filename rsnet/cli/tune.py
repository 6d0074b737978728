"""`rsnet tune`: calibrate a network's probabilities, and find a cascade that meets a target."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from pipelines.utils.errors import UsageError
from pipelines.utils.output import say
from pipelines.utils.tables import text_table
from rsnet.cli.classifier import ClassifierOptions, LatencyOptions, load_classifier, say_source

if TYPE_CHECKING:
    from rsnet.inference.cascade import CascadeStage
    from rsnet.inference.cascade_search import TuneResult


@dataclass(frozen=True, kw_only=True)
class Options(LatencyOptions, ClassifierOptions):
    """Fit temperatures and the thresholds of a cascade to labelled images, for `rsnet predict --tuned`.

    Half of the images, drawn by chance, is fitted to; what is printed is of the other half. The result
    is tuned.json in the run's or the release's folder, or beside the file, in place of an earlier one.
    Exit code 1 if the target cannot be met.
    """

    data: Annotated[Path, arg(aliases=("-d",), metavar="VAL")]
    """Folder with one folder of images per class, or one whose val/ is that."""

    target_top1: Annotated[float | None, arg(metavar="PERCENT")] = None
    """Find the fastest cascade with this top-1."""

    target_ms: float | None = None
    """Find the most accurate cascade within so many milliseconds per image on average, in full batches."""

    def __post_init__(self) -> None:
        if (self.target_top1 is None) == (self.target_ms is None):
            raise UsageError("--target-top1, --target-ms: give one of the two")
        if self.target_top1 is not None and not 0 <= self.target_top1 <= 100:
            raise UsageError(f"--target-top1 {self.target_top1}: must be a percentage")
        if self.target_ms is not None and not self.target_ms > 0:
            raise UsageError(f"--target-ms {self.target_ms}: must be above 0")


def run(options: Options) -> int:
    from pipelines.utils.progress import ProgressBar
    from rsnet.inference.calibration import collect_logits, find_labelled_images
    from rsnet.inference.cascade import TUNED_FILE
    from rsnet.inference.cascade_search import tune_release

    classifier, source = load_classifier(options)
    tuned_file = classifier.release.beside(TUNED_FILE)
    folder = find_labelled_images(options.data, classifier.config["network"])
    if not os.access(tuned_file.parent, os.W_OK):
        raise UsageError(f"cannot write into {tuned_file.parent}, where {tuned_file.name} belongs")
    say_source(source)
    with ProgressBar("evaluate", len(folder.paths)) as bar:
        scores = collect_logits(classifier, folder, lambda done, size: bar.update(done, size, 0))
    result = tune_release(classifier, scores, options.target_top1, options.target_ms)
    say(
        f"{result.held_out_images} images, others than the {result.fitted_images} that were fitted to; "
        f"{classifier.conditions['device']}, batches of {options.batch_size}, {options.dtype}"
    )
    print(_sizes_table(result))
    print(_cascade_table(result))
    (low, high), (fast, slow) = result.interval
    say(
        f"of other images of this kind, by bootstrap: top-1 from {low:.2f} to {high:.2f} %, {fast:.4f} to "
        f"{slow:.4f} ms (95 of 100 times)"
    )
    if options.target_top1 is not None and result.held_out.top1 < options.target_top1:
        say(f"note: that is below {options.target_top1:g} %; more images would fit it better")
    say(f"{tuned_file}: {_shown(result.tuned.cascade)}")
    return 0


def _sizes_table(result: TuneResult) -> str:
    rows = [
        [
            str(s.size), f"{s.top1:.2f}", f"{s.ms:.4f}", f"{s.temperature:.3f}", f"{s.ece:.2f}",
            f"{s.tuned_ece:.2f}",
        ]
        for s in result.sizes
    ]  # fmt: skip
    return text_table(["size", "top-1 %", "ms", "temperature", "ECE %, before", "after"], rows)


def _cascade_table(result: TuneResult) -> str:
    decided = ", ".join(f"{size}: {share:.1f}" for size, share in result.shares.items())
    rows = [
        [name, f"{outcome.top1:.2f}", f"{outcome.ms:.4f}", note]
        for name, outcome, note in (
            ("cascade, where fitted", result.fitted, ""),
            ("cascade", result.held_out, decided),
        )
    ]
    if (best := result.best_size) is not None:
        rows.append([f"best size as fast: {best.size}", f"{best.top1:.2f}", f"{best.ms:.4f}", ""])
    return text_table(["", "top-1 %", "ms", "% that each size decides"], rows, left=(0, 3))


def _shown(cascade: Sequence[CascadeStage]) -> str:
    *smaller, last = cascade
    stages = "".join(f"{size}, below {threshold:.3f} " for size, threshold in smaller)
    return f"{stages}{last.size}"

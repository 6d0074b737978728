"""`rsnet bench`: measure a network's sizes and cascades on this device."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from pipelines.utils.errors import UsageError
from pipelines.utils.output import say
from pipelines.utils.tables import text_table
from rsnet.cli.classifier import ClassifierOptions, load_classifier, say_source
from rsnet.cli.output import require_new
from rsnet.cli.wandb_table import log_table, require_wandb

if TYPE_CHECKING:
    from rsnet.inference.benchmark import Figures, SizeFigures, Times


@dataclass(frozen=True, kw_only=True)
class Options(ClassifierOptions):
    """Measure accuracy, speed and memory of each size, and of cascades, on labelled images.

    Cascades are reported on the half of the images that `rsnet tune` does not fit to.
    """

    data: Annotated[Path, arg(aliases=("-d",), metavar="VAL")]
    """Folder with one folder of images per class, or one whose val/ is that."""

    json: bool = False
    """JSON on stdout in place of the tables."""

    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """New folder for bench.json and accuracy_latency.png. Unset: none."""

    card: bool = False
    """Put the figures into a release's README.md, in place of those of an earlier bench."""

    wandb: Annotated[
        Literal["online", "offline", "disabled"], arg(metavar="{online,offline,disabled}")
    ] = "disabled"
    """Weights & Biases: the table and the plot; needs --output."""

    wandb_project: Annotated[str | None, arg(metavar="NAME")] = None
    """W&B project. Unset: WANDB_PROJECT, else rsnet."""

    wandb_name: Annotated[str | None, arg(metavar="NAME")] = None
    """W&B run name. Unset: WANDB_NAME, else the output folder's name."""

    def __post_init__(self) -> None:
        if self.wandb != "disabled" and self.output is None:
            raise UsageError("--wandb: give --output, too, the folder that W&B logs in")


def run(options: Options) -> int:
    from pipelines.utils.progress import ProgressBar
    from rsnet.inference.benchmark import measure, tuned_of
    from rsnet.inference.benchmark_report import COLUMNS, rows, section, write_results
    from rsnet.inference.calibration import collect_logits, find_labelled_images
    from rsnet.inference.latency import unsteady
    from rsnet.release.model_card import update_bench

    output = options.output
    if output is not None:
        require_new("--output", output)
    require_wandb(options)
    classifier, source = load_classifier(options)
    folder = find_labelled_images(options.data, classifier.config["network"])
    if options.card:
        if source.release is None:
            raise UsageError(f"--card: {source.path} is no release, which alone has a README.md")
        update_bench(source.file, None)  # reports what is wrong before minutes have passed
    tuned_of(classifier)  # a file that is damaged is said before minutes have passed, too
    say_source(source, sys.stderr)
    with ProgressBar("evaluate", len(folder.paths)) as bar:
        scores = collect_logits(classifier, folder, lambda done, size: bar.update(done, size, 0))
    figures = measure(classifier, scores)
    times = {s.size: {"median": s.ms_batch["p50"], "p95": s.ms_batch["p95"]} for s in figures.sizes}
    if reason := unsteady(times):
        say(f"note: the device was busy with something else: {reason}", sys.stderr)
    # Before what is written, as that may fail after minutes.
    print(json.dumps(figures.to_dict()) if options.json else _tables(figures))
    if output is not None:
        plot = write_results(output, classifier.config["network"]["arch"], figures)
        config = {**figures.conditions, "images": figures.images}
        log_table(options, config, COLUMNS, rows(figures), plot)
    if options.card:
        update_bench(source.file, section(figures))
    return 0


def _tables(figures: Figures) -> str:
    """Return tables of the sizes, of how their answers differ, and of cascades."""
    from rsnet.inference.benchmark_report import conditions_line, named_cascades

    batch = figures.conditions["batch_size"]
    sizes = text_table(
        ["size", "GMACs", "top-1 %", "top-5 %", "ECE %", "tuned", "ms of 1: p50, p95, p99",
         f"ms of {batch}: p50, p95, p99", "images/s", "peak MB"],
        map(_size_row, figures.sizes),
    )  # fmt: skip
    churn = text_table(
        ["", *map(str, figures.churn)],
        ([str(a), *(f"{v:.2f}" for v in row.values())] for a, row in figures.churn.items()),
    )
    cascades = text_table(
        ["cascade", "top-1 %", "ms an image", "% that each size decides"],
        (
            [name, f"{c.top1:.2f}", f"{c.ms:.4f}",
             ", ".join(f"{size}: {share:.1f}" for size, share in c.shares.items())]
            for name, c in named_cascades(figures)
        ),
        left=(0, 3),
    )  # fmt: skip
    return (
        f"{conditions_line(figures)}\n{sizes}\n\n"
        f"% of the images whose answers differ between two sizes\n{churn}\n\n"
        f"{figures.held_out} images, which tune does not fit to\n{cascades}"
    )


def _size_row(s: SizeFigures) -> list[str]:
    tuned = "" if s.tuned_ece is None else f"{s.tuned_ece:.2f}"
    peak = "" if s.peak_mb is None else f"{s.peak_mb:.1f}"
    return [
        str(s.size), f"{s.gmacs:.3f}", f"{s.top1:.2f}", f"{s.top5:.2f}", f"{s.ece:.2f}", tuned,
        _times(s.ms_one), _times(s.ms_batch), f"{s.images_per_s:.0f}", peak,
    ]  # fmt: skip


def _times(times: Times) -> str:
    return " ".join(f"{value:8.2f}" for value in times.values())

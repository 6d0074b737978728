"""`python -m rsnet bench`: what a release's sizes and cascades are worth on this device."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from pipelines.utils.atomic_io import atomic_write, atomic_write_json
from pipelines.utils.errors import DataError, UsageError, error_context
from rsnet.inference import benchmark_report as bench_report
from rsnet.inference import scores
from rsnet.inference.benchmark import Figures, measure
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.loggers.wandb_logger import WandbLogger
from rsnet.release import model_card as release_card
from rsnet.release import package as release


@dataclass(frozen=True)
class Options:
    """Measure accuracy, speed and memory of each size, and of cascades, on labelled images.

    Cascades are reported on the half of the images that `python -m rsnet tune` does not fit to.
    """

    release: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Folder that `python -m rsnet release` wrote."""

    data: Annotated[Path, arg(aliases=("-d",), metavar="VAL")]
    """Folder with one folder of images per class, or one whose val/ is that."""

    device: str | None = None
    """cpu, cuda, cuda:1, ... Unset: the GPU if there is one."""

    batch_size: int = 32
    """Images that are computed at once; a batch of one is measured besides."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in."""

    json: bool = False
    """JSON on stdout in place of the tables."""

    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """New folder for bench.json and accuracy_latency.png. Unset: neither is written."""

    card: bool = False
    """Put the figures into the release's README.md, in place of those of an earlier bench."""

    wandb: Annotated[
        Literal["online", "offline", "disabled"], arg(metavar="{online,offline,disabled}")
    ] = "disabled"
    """Weights & Biases: the table and the plot; needs --output."""

    wandb_project: str = "rsnet"
    """W&B project."""

    wandb_name: Annotated[str | None, arg(metavar="NAME")] = None
    """W&B run name. Unset: the output folder's name."""

    def __post_init__(self) -> None:
        if self.wandb != "disabled" and self.output is None:
            raise UsageError("--wandb: give --output, too, the folder that W&B logs in")


def run(options: Options) -> int:
    output = options.output
    if output is not None and (output.exists() or output.is_symlink()):
        raise UsageError(f"--output: {output} exists; give another name")
    classifier = SwitchableClassifier.load(
        options.release,
        options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=torch.bfloat16 if options.dtype == "bfloat16" else None,
        batch_size=options.batch_size,
    )
    folder = scores.find(options.data, classifier.config["network"])
    card = options.release / release.CARD
    if options.card:
        _refreshed(card, "")  # says what is wrong before minutes have passed
    figures = measure(classifier, scores.collect(classifier, folder))
    content = dataclasses.asdict(figures)
    print(json.dumps(content) if options.json else bench_report.tables(figures))
    if output is not None:
        output.mkdir(parents=True)
        atomic_write_json(output / "bench.json", content)
        plot = output / "accuracy_latency.png"
        bench_report.plot(plot, classifier.config["network"]["arch"], figures)
        if options.wandb != "disabled":
            _log_to_wandb(options, output, figures, plot)
    if options.card:
        atomic_write(card, _refreshed(card, bench_report.section(figures)).encode())
    return 0


def _refreshed(card: Path, section: str) -> str:
    """Raises UsageError if there is no card, or it cannot be written; DataError if it is damaged."""
    if not card.is_file() or not os.access(card.parent, os.W_OK):
        raise UsageError(f"--card: there is no {card} that can be written")
    try:
        with error_context(str(card)):
            return release_card.with_bench(card.read_bytes().decode(), section)
    except UnicodeDecodeError as error:
        raise DataError(f"{card} is no UTF-8") from error


def _log_to_wandb(options: Options, output: Path, figures: Figures, plot: Path) -> None:
    log = WandbLogger(
        options.wandb,
        output,
        project=options.wandb_project,
        name=options.wandb_name,
        config={**figures.conditions, "images": figures.images},
        run_id=None,
        say=lambda line: print(line, file=sys.stderr),
        remedy=f"all of it is in {output}",
    )
    log.log_results(bench_report.COLUMNS, bench_report.rows(figures), plot)
    log.finish()

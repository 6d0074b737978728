"""Finished runs side by side: accuracy, GMACs, parameters and speed, as tables and as a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipelines.utils.errors import UsageError
from pipelines.utils.schema import parsing, read_json
from rsnet.config.costs import require_gmacs
from rsnet.config.recipes import by_new_names
from rsnet.evaluation.plot_labels import label_points
from rsnet.losses import ENSEMBLE


@dataclass(frozen=True)
class RunSummary:
    """Accuracy, cost and speed of a finished run, from its directory."""

    path: Path
    seed: int
    top1: dict[str, float]  # % by size, and of the ensemble
    gmacs: dict[str, float]  # an image
    shared: int  # parameters
    private: int
    images: float  # trained on
    seconds: float  # of training steps, without evaluations
    options: dict[str, Any]

    @property
    def sizes(self) -> list[str]:
        return [name for name in self.top1 if name != ENSEMBLE]


LEGEND_COLUMNS = 2
COLOURS, MARKERS = 10, "os^Dv"  # of matplotlib's cycle; a marker of its own for each round of it

# Options that say where and how a run is written, not what it does.
ASIDE = {
    "allow_change", "checkpoint_every", "evaluate", "keep", "log_interval", "on_save_error", "output",
    "resume", "tensorboard", "timeout", "val_interval",
}  # fmt: skip

# By label; several runs are seeds of one experiment, or networks of one size each.
Groups = Mapping[str, Sequence[RunSummary]]


def read_run(path: Path) -> RunSummary:
    """Summarise a run directory.

    Raises UsageError if it holds no finished run, DataError if its files are damaged.
    """
    if not (path / "results.json").is_file():
        raise UsageError(f"{path}: no results.json; is it the directory of a finished run?")
    remedy = "leave the run out"
    with parsing(path, remedy):
        results: dict[str, Any] = read_json(path / "results.json", remedy)
        config: dict[str, Any] = read_json(path / "config.json", remedy)
        metrics = path / "metrics.jsonl"
        with parsing(metrics, remedy):
            lines = [json.loads(line) for line in metrics.read_bytes().splitlines()]
        require_gmacs(results)
        gmacs, parameters = results.pop("gmacs"), results.pop("parameters")
        if len(results) == 2:
            results.pop(ENSEMBLE)  # of one size: itself
        images, seconds = _work([line for line in lines if "perf/step_time" in line])
        return RunSummary(
            path=path,
            seed=config["seed"],
            top1={name: r["top1"] for name, r in results.items()},
            gmacs=gmacs,
            shared=parameters["shared"],
            private=parameters["private"],
            images=images,
            seconds=seconds,
            options=by_new_names(config),
        )


def tables(groups: Groups) -> str:
    """Return two Markdown tables: top-1 by size, and what it costs. Mean ± standard deviation over runs."""
    names = _sizes(groups)
    accuracy = [["top-1 %", *names]]
    cost = [["", "GMACs an image", "parameters shared", "private", "images/s", "training, minutes"]]
    for label, runs in groups.items():
        accuracy.append([label, *(_mean_and_spread([r.top1.get(n) for r in runs]) for n in names)])
        gmacs = {n: r.gmacs[n] for r in runs for n in r.sizes}
        # Networks of one size each are counted together: what all sizes cost.
        seeds = len({r.seed for r in runs})
        seconds = sum(r.seconds for r in runs) / seeds
        images = statistics.mean(r.images for r in runs)
        cost.append(
            [
                label,
                " ".join(f"{gmacs[n]:.3g}" for n in names if n in gmacs),
                f"{sum(r.shared for r in runs) / seeds:,.0f}",
                f"{sum(r.private for r in runs) / seeds:,.0f}",
                f"{images / seconds:.0f}" if seconds else "",
                f"{seconds / 60:.1f}",
            ]
        )
    return markdown_table(accuracy) + "\n\n" + markdown_table(cost)


def differing_options(runs: Mapping[str, RunSummary]) -> str:
    """Return a Markdown table of the options that differ between runs, by label; "" if there is none.

    An option that a run did not write down, as it is of another pipeline or version, is a "-" there.
    """
    names = dict.fromkeys(name for run in runs.values() for name in run.options)
    table = [["option", *runs]]
    for name in names:
        if name in ASIDE or name.startswith(("wandb", "profile")):
            continue
        known = [run.options[name] for run in runs.values() if name in run.options]
        if any(value != known[0] for value in known):
            has = [(name in run.options, run.options.get(name)) for run in runs.values()]
            cells = [_shown(value) if is_known else "-" for is_known, value in has]
            table.append([f"`--{name.replace('_', '-')}`", *cells])
    return markdown_table(table) if len(table) > 1 else ""


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def plot(path: Path, groups: Groups) -> None:
    """Plot top-1 over GMACs, one line a group, bars for the standard deviation; a PNG at `path`."""
    lines = -(-len(groups) // LEGEND_COLUMNS)
    figure = Figure(figsize=(7, 5 + 0.25 * lines), layout="constrained")
    axes = figure.subplots()
    points: list[tuple[str, float, float]] = []
    for i, (label, runs) in enumerate(groups.items()):
        names = [n for n in _sizes({label: runs}) if n != ENSEMBLE]
        x = [next(r.gmacs[n] for r in runs if n in r.gmacs) for n in names]
        top1 = [[r.top1[n] for r in runs if n in r.top1] for n in names]
        y = [statistics.mean(values) for values in top1]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in top1]
        marker = MARKERS[i // COLOURS % len(MARKERS)]
        # A path, which is no formula; matplotlib leaves out what begins with an underscore.
        shown = f"./{label}" if label.startswith("_") else label
        axes.errorbar(x, y, spread, fmt=f"{marker}-", capsize=3, label=shown)
        points += zip(names, x, y, strict=True)
    axes.set(xlabel="GMACs an image", ylabel="top-1 %")
    axes.grid(alpha=0.3)
    legend = figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS)
    for text in legend.get_texts():
        text.set_parse_math(False)
    label_points(axes, points)
    figure.savefig(path, dpi=120)


def _work(steps: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return images and seconds of the logged steps; a line covers all steps since the one before.

    Counted by epochs, because a run resumed with another global batch has another number of steps per epoch;
    from the one that the first line lies in, as a run may begin with another's checkpoint.
    """
    images = seconds = 0.0
    epoch = math.ceil(steps[0]["epoch"]) - 1 if steps else 0
    for line in steps:
        steps_per_epoch = line["step"] / line["epoch"]
        span = (line["epoch"] - epoch) * steps_per_epoch * line["perf/step_time"]
        images, seconds = images + span * line["perf/images_per_s"], seconds + span
        epoch = line["epoch"]
    return images, seconds


def _sizes(groups: Groups) -> list[str]:
    """Return all sizes of the runs, the largest first, and the ensemble if there is one of several."""
    sizes = {n for runs in groups.values() for r in runs for n in r.sizes}
    has_ensemble = any(ENSEMBLE in r.top1 for runs in groups.values() for r in runs)
    return sorted(sizes, key=int, reverse=True) + [ENSEMBLE] * has_ensemble


def _mean_and_spread(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{spread}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as an aligned Markdown table; the first is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)

"""Reports of a benchmark: rows for W&B, a section of the model card, a plot of accuracy over latency."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.utils.atomic_io import atomic_write_json
from rsnet.inference.benchmark import CascadeFigures, Figures

COLUMNS: list[str | int] = [
    "size", "GMACs", "top1", "top5", "ece", "tuned_ece", "ms_one_p50", "ms_one_p95", "ms_one_p99",
    "ms_batch_p50", "ms_batch_p95", "ms_batch_p99", "images_per_s", "peak_mb",
]  # fmt: skip


def rows(figures: Figures) -> list[list[Any]]:
    """Return one row of `COLUMNS` per size, the largest first."""
    return [
        [
            str(s.size), s.gmacs, s.top1, s.top5, s.ece, s.tuned_ece, *s.ms_one.values(),
            *s.ms_batch.values(), s.images_per_s, s.peak_mb,
        ]
        for s in figures.sizes
    ]  # fmt: skip


def section(figures: Figures) -> str:
    """Return the figures of one device for a model card, in Markdown."""
    batch = figures.conditions["batch_size"]
    lines = [
        f"## On {figures.conditions['device']}",
        "",
        f"{conditions_line(figures)}. Times are of batches, from pixels on the host to probabilities there;",
        "ms an image: the median batch's over its images. ECE: expected calibration error.",
        "",
        f"| size | top-1 % | top-5 % | ECE % | images/s, batch {batch} | ms an image | ms, batch 1 | p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in figures.sizes:
        lines.append(
            f"| {s.size} | {s.top1:.2f} | {s.top5:.2f} | {s.ece:.2f} | {s.images_per_s:.0f} "
            f"| {s.ms_batch['p50'] / batch:.4g} | {s.ms_one['p50']:.2f} | {s.ms_one['p99']:.2f} |"
        )
    for c in figures.cascades:
        if c.how == "tuned":
            what = f"top-1 {c.top1:.2f} % at {c.ms:.4g} ms an image"
            images = (
                f"{figures.held_out} images, none of which it was fitted to if it was on this data"
            )
            lines += ["", f"The cascade in tuned.json: {what} ({images})."]
    return "\n".join(lines)


def write_results(folder: str | Path, title: str, figures: Figures) -> Path:
    """Write bench.json and accuracy_latency.png into a new folder; return the path of the plot."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    atomic_write_json(folder / "bench.json", figures.to_dict())
    path = folder / "accuracy_latency.png"
    plot(path, title, figures)
    return path


def plot(path: str | Path, title: str, figures: Figures) -> None:
    """Draw top-1 over milliseconds an image, of the sizes and of cascades of them; a PNG at `path`."""
    from matplotlib.figure import Figure  # not installed where releases are only used

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for how, style, marker_size, label in (
        ("searched", "-", 0, "cascade, a threshold for each size"),
        ("confidence", ".--", 5, "cascade, one confidence for all sizes"),
        ("size", "o", 6, "one size for all images"),
        ("tuned", "*", 12, "tuned.json"),
    ):
        some = sorted((c for c in figures.cascades if c.how == how), key=lambda c: c.ms)
        if some:
            x, y = [c.ms for c in some], [c.top1 for c in some]
            axes.plot(x, y, style, ms=marker_size, label=label)
        if how == "size":
            for c in some:
                at = (c.ms, c.top1)
                axes.annotate(
                    str(c.cascade[0].size), at, textcoords="offset points", xytext=(4, -12)
                )
    conditions = figures.conditions
    axes.set(
        xlabel=f"ms an image, batches of {conditions['batch_size']}, {conditions['device']}",
        ylabel=f"top-1 % of {figures.held_out} images",
        title=title,
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def conditions_line(figures: Figures) -> str:
    """Return images, device, threads, dtype and version of torch as one line."""
    c = figures.conditions
    dtype = c["dtype"].removeprefix("torch.")
    threads = f"{c['threads']} thread{'s' * (c['threads'] > 1)}"
    engine = c.get("engine", f"torch {c['torch']}")
    return f"{figures.images} images; {c['device']}, {threads}, {dtype}, {engine}"


def named_cascades(figures: Figures) -> Iterator[tuple[str, CascadeFigures]]:
    """Yield each size, followed by the best that was searched and is as fast; then the other cascades."""
    searched = [c for c in figures.cascades if c.how == "searched"]
    for c in figures.cascades:
        if c.how == "size":
            yield f"size {c.cascade[0].size}", c
            as_fast = [s for s in searched if s.ms <= c.ms * (1 + 1e-9)]
            if as_fast:  # none, if all are slower on the images that they were not searched on
                yield "  cascade as fast", max(as_fast, key=lambda s: s.ms)
        elif c.how == "confidence":
            yield f"confidence {c.cascade[0].threshold:g}", c
        elif c.how == "tuned":
            yield "tuned.json", c

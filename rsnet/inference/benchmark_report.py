"""What bench measured: tables, a section of the model card, and a plot of accuracy over latency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rsnet.inference.benchmark import CascadeFigures, Figures, SizeFigures, Times

COLUMNS: list[str | int] = [
    "size", "GFLOPs", "top1", "top5", "ece", "tuned_ece", "ms_one_p50", "ms_one_p95", "ms_one_p99",
    "ms_batch_p50", "ms_batch_p95", "ms_batch_p99", "images_per_s", "peak_mb",
]  # fmt: skip


def rows(figures: Figures) -> list[list[Any]]:
    """One row of `COLUMNS` per size, the largest first."""
    return [
        [
            str(s.size), s.gflops, s.top1, s.top5, s.ece, s.tuned_ece, *s.ms_one.values(),
            *s.ms_batch.values(), s.images_per_s, s.peak_mb,
        ]
        for s in figures.sizes
    ]  # fmt: skip


def tables(figures: Figures) -> str:
    """The sizes, how their answers differ, and cascades, for a terminal."""
    batch = figures.conditions["batch_size"]
    head = ["size", "GFLOPs", "top-1 %", "top-5 %", "ECE %", "tuned", "ms of 1: p50, p95, p99",
            f"ms of {batch}: p50, p95, p99", "images/s", "peak MB"]  # fmt: skip
    sizes = [head, *(_row(s) for s in figures.sizes)]
    names = [str(a) for a in figures.churn]
    churn = [
        ["", *names],
        *([str(a), *(f"{v:.2f}" for v in line.values())] for a, line in figures.churn.items()),
    ]
    cascades = [
        ["cascade", "top-1 %", "ms an image", "% that each size decides"],
        *([name, f"{c.top1:.2f}", f"{c.ms:.4f}", _decided(c)] for name, c in _named(figures)),
    ]
    return "\n\n".join(
        [
            f"{_conditions(figures)}\n{_aligned(sizes)}",
            f"% of the images whose answers differ between two sizes\n{_aligned(churn)}",
            f"{figures.held_out} images, which tune does not fit to\n{_aligned(cascades, left=(0, 3))}",
        ]
    )


def section(figures: Figures) -> str:
    """The figures of one device for a model card, in Markdown."""
    batch = figures.conditions["batch_size"]
    lines = [
        f"## On {figures.conditions['device']}",
        "",
        f"{_conditions(figures)}. Times are of batches, from pixels on the host to probabilities there;",
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
            images = f"{figures.held_out} images that it was not fitted to"
            lines += ["", f"The cascade in tuned.json: {what} ({images})."]
    return "\n".join(lines)


def plot(path: Path, title: str, figures: Figures) -> None:
    """Top-1 over milliseconds an image: the sizes, and cascades of them; a PNG at `path`."""
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
                    str(c.ladder[0].size), at, textcoords="offset points", xytext=(4, -12)
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


def _conditions(figures: Figures) -> str:
    c = figures.conditions
    dtype = c["dtype"].removeprefix("torch.")
    threads = f"{c['threads']} thread{'s' * (c['threads'] > 1)}"
    return f"{figures.images} images; {c['device']}, {threads}, {dtype}, torch {c['torch']}"


def _row(s: SizeFigures) -> list[str]:
    tuned = "" if s.tuned_ece is None else f"{s.tuned_ece:.2f}"
    return [
        str(s.size), f"{s.gflops:.3f}", f"{s.top1:.2f}", f"{s.top5:.2f}", f"{s.ece:.2f}", tuned,
        _times(s.ms_one), _times(s.ms_batch), f"{s.images_per_s:.0f}", f"{s.peak_mb:.1f}",
    ]  # fmt: skip


def _times(times: Times) -> str:
    return " ".join(f"{value:8.2f}" for value in times.values())


def _named(figures: Figures) -> Iterator[tuple[str, CascadeFigures]]:
    """Each size, followed by the best that was searched and is as fast; the other cascades."""
    searched = [c for c in figures.cascades if c.how == "searched"]
    for c in figures.cascades:
        if c.how == "size":
            yield f"size {c.ladder[0].size}", c
            yield (
                "  cascade as fast",
                max((s for s in searched if s.ms <= c.ms), key=lambda s: s.ms),
            )
        elif c.how == "confidence":
            yield f"confidence {c.ladder[0].threshold:g}", c
        elif c.how == "tuned":
            yield "tuned.json", c


def _decided(c: CascadeFigures) -> str:
    return ", ".join(f"{size}: {share:.1f}" for size, share in c.shares.items())


def _aligned(lines: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )

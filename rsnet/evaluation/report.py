"""Results of an evaluation as a table and as a plot of accuracy over GMACs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from pipelines.utils.tables import text_table
from rsnet.evaluation.plot_labels import label_points
from rsnet.losses import ENSEMBLE

COLUMNS: list[str | int] = ["size", "GMACs", "top1", "top5", "loss"]

Results = Mapping[str, Mapping[str, float]]


def rows(results: Results, gmacs: Mapping[str, float]) -> list[list[str | float]]:
    """Return a row of `COLUMNS` per size, the largest first, and the ensemble's, which costs all of them."""
    return [[name, gmacs[name], r["top1"], r["top5"], r["loss"]] for name, r in results.items()]


def table(results: Results, gmacs: Mapping[str, float]) -> str:
    """Return the rows as aligned text."""
    return text_table(
        ["size", "GMACs", "top-1 %", "top-5 %", "loss"],
        [
            [str(name), f"{cost_:.3f}", f"{top1:.2f}", f"{top5:.2f}", f"{loss:.4f}"]
            for name, cost_, top1, top5, loss in rows(results, gmacs)
        ],
    )


def plot(path: Path, title: str, results: Results, gmacs: Mapping[str, float]) -> None:
    """Plot top-1 over GMACs, one point per size, and the ensemble apart; a PNG at `path`."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    sizes = [name for name in results if name != ENSEMBLE]
    x = [gmacs[s] for s in sizes]
    y = [results[s]["top1"] for s in sizes]
    axes.plot(x, y, "o-", label="one network, its resolutions")
    axes.plot(gmacs[ENSEMBLE], results[ENSEMBLE]["top1"], "*", ms=12, label="their ensemble")
    axes.set(xlabel="GMACs an image", ylabel="top-1 %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    label_points(axes, zip(sizes, x, y, strict=True), size=10)
    figure.savefig(path, dpi=120)

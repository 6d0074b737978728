"""Results of an evaluation as a table and as a plot of accuracy over FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rsnet.losses import ENSEMBLE

COLUMNS: list[str | int] = ["size", "GFLOPs", "top1", "top5", "loss"]

Results = Mapping[str, Mapping[str, float]]


def rows(results: Results, gflops: Mapping[str, float]) -> list[list[str | float]]:
    """One row of `COLUMNS` per size, the largest first, and the ensemble's, which costs all of them."""
    return [[name, gflops[name], r["top1"], r["top5"], r["loss"]] for name, r in results.items()]


def cost(sizes: Sequence[int], gflops: Sequence[float]) -> dict[str, float]:
    """GFLOPs by the names that `Results` have."""
    return dict(zip(map(str, sizes), gflops, strict=True)) | {ENSEMBLE: sum(gflops)}


def table(results: Results, gflops: Mapping[str, float]) -> str:
    """The rows as aligned text."""
    lines = [f"{'size':>8}  {'GFLOPs':>7}  {'top-1 %':>7}  {'top-5 %':>7}  {'loss':>7}"]
    for name, cost_, top1, top5, loss in rows(results, gflops):
        lines.append(f"{name:>8}  {cost_:7.3f}  {top1:7.2f}  {top5:7.2f}  {loss:7.4f}")
    return "\n".join(lines)


def plot(path: Path, title: str, results: Results, gflops: Mapping[str, float]) -> None:
    """Top-1 over GFLOPs, one point per size, and the ensemble apart; a PNG at `path`."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    sizes = [name for name in results if name != ENSEMBLE]
    x = [gflops[s] for s in sizes]
    y = [results[s]["top1"] for s in sizes]
    axes.plot(x, y, "o-", label="one network, its resolutions")
    for name, at_x, at_y in zip(sizes, x, y, strict=True):
        axes.annotate(name, (at_x, at_y), textcoords="offset points", xytext=(4, -12))
    axes.plot(gflops[ENSEMBLE], results[ENSEMBLE]["top1"], "*", ms=12, label="their ensemble")
    axes.set(xlabel="GFLOPs an image", ylabel="top-1 %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)

"""A training's curves: losses and accuracy of each size, and the learning rate, over epochs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from rsnet.losses import ENSEMBLE

POINTS = 400  # of a curve; more are averaged, so that lines stay apart

Curve = tuple[list[float], list[float]]  # epochs, values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; those that a crash cut short are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("epoch"), int | float):
            found.append(row)
    return found


def curves_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return the points of every metric by its name."""
    curves: dict[str, Curve] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float):
                epochs, values = curves.setdefault(name, ([], []))
                epochs.append(row["epoch"])
                values.append(value)
    return curves


def plot_curves(path: Path, title: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Plot losses in training and validation, top-1, and the learning rate; a PNG at `path`.

    A training by binary cross-entropy has an axis of its own for it: validation has cross-entropy.
    """
    curves = curves_of(rows)
    results = [name.split("@")[1] for name in curves if name.startswith("val/top1@")]
    trained = [
        name.split("/")[2] for name in curves if name.startswith(("train/ce/", "train/bce/"))
    ]
    names = list(dict.fromkeys([*results, *trained]))
    sizes = sorted((name for name in names if name != ENSEMBLE), key=int, reverse=True)
    colors: dict[str, Any] = dict(
        zip(sizes, mpl.colormaps["viridis"].resampled(len(sizes) + 1).colors, strict=False)  # type: ignore[attr-defined]
    )
    colors[ENSEMBLE] = "tab:red"
    figure = Figure(figsize=(8, 8), layout="constrained")
    losses, accuracy, rate = figure.subplots(3, sharex=True, height_ratios=(3, 3, 1))
    binary = losses.twinx() if any(name.startswith("train/bce/") for name in curves) else None
    for name in [*sizes, ENSEMBLE]:
        if name != ENSEMBLE:  # which trains its weights alone
            _draw(losses, curves.get(f"train/ce/{name}"), color=colors[name], lw=1)
            _draw(binary, curves.get(f"train/bce/{name}"), color=colors[name], lw=1)
            _draw(losses, curves.get(f"val/loss@{name}"), color=colors[name], lw=1.5, ls="--")
        _draw(accuracy, curves.get(f"val/top1@{name}"), color=colors[name], label=name, marker=".")
    _draw(rate, curves.get("lr"), color="black", lw=1)
    losses.set(ylabel="cross-entropy", title=title)
    if binary is not None:
        binary.set(ylabel="binary cross-entropy, training")
    accuracy.plot([], [], color="gray", lw=1, label="training")
    accuracy.plot([], [], color="gray", lw=1.5, ls="--", label="validation")
    accuracy.set(ylabel="top-1 %")
    rate.set(ylabel="learning rate", xlabel="epochs", ylim=(0, None))
    for axes in (losses, accuracy, rate):
        axes.grid(alpha=0.3)
    # Beside the axes, where no curve is.
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)


def _draw(axes: Any, curve: Curve | None, **style: Any) -> None:
    if curve is not None:
        axes.plot(*(_thinned(values) for values in curve), **style)


def _thinned(values: Sequence[float]) -> list[float]:
    """Return at most `POINTS` means of neighbouring values."""
    width = -(-len(values) // POINTS)
    return [fmean(values[i : i + width]) for i in range(0, len(values), width)]

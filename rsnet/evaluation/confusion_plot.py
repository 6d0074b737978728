"""The confusion matrix as a plot that can be read whatever the number of classes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from pipelines.utils.text import printable
from rsnet.evaluation.metrics import Confusion

CLASSES = 24  # of the matrix: more names are not readable
PAIRS = 20  # of the bars
LONGEST = 28  # characters of a name


def plot(
    path: Path, title: str, found: Confusion, results: Sequence[str], names: Sequence[str]
) -> None:
    """Draw the matrix at the largest size, and its most frequent confusions as bars; a PNG at `path`.

    The matrix has all classes, or, if they are more than 24, those of the most frequent confusions. results:
    the names of the R results that are counted. names: of all outputs.
    """
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(printable(title), parse_math=False)
    classes, all_of_them = _chosen_classes(found)
    _draw_matrix(left, found, classes, names)
    every = "all classes" if all_of_them else f"the {len(classes)} classes that are confused most"
    left.set_title(f"% of a label's images, {every}")
    _draw_pairs(right, found, results, names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # that the font has not
        figure.savefig(path, dpi=100)


def _chosen_classes(found: Confusion) -> tuple[NDArray[np.int64], bool]:
    """Return the outputs in the matrix, and whether they are all that occur at the largest size."""
    counted = found.counts[:, 0] > 0
    every = np.unique([found.labels[counted], found.answers[counted]])
    if len(every) <= CLASSES:
        return every, True
    chosen: list[int] = []
    for pair in found.wrong:
        both = [c for c in (int(found.labels[pair]), int(found.answers[pair])) if c not in chosen]
        if len(chosen) + len(both) > CLASSES:
            break
        chosen += both
    if not chosen:  # no image is wrong
        return every[:CLASSES], False
    return np.sort(np.array(chosen, np.int64)), False


def _draw_matrix(
    axes: Axes, found: Confusion, classes: NDArray[np.int64], names: Sequence[str]
) -> None:
    place = {int(output): i for i, output in enumerate(classes)}
    share = np.zeros((len(classes), len(classes)))
    for label, answer, count, images in zip(
        found.labels.tolist(), found.answers.tolist(), found.counts[:, 0].tolist(), found.images.tolist(),
        strict=True,
    ):  # fmt: skip
        if label in place and answer in place:
            share[place[label], place[answer]] = 100 * count / images
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.argwhere(share >= 0.5):
        value = share[row, column]
        colour = "white" if value > 50 else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", size=7, color=colour)
    labels = [_short(names[output]) for output in classes]
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=90, size=8, parse_math=False)
    axes.set_yticks(ticks, labels, size=8, parse_math=False)
    axes.set(xlabel="answer", ylabel="label")


def _draw_pairs(axes: Axes, found: Confusion, results: Sequence[str], names: Sequence[str]) -> None:
    """Draw % of the label's images as bars, of the largest size, and as a mark each, of the others."""
    pairs = found.wrong[:PAIRS]
    at = np.arange(len(pairs))
    share = 100 * found.counts[pairs] / found.images[pairs][:, None]
    axes.barh(at, share[:, 0], color="tab:blue", alpha=0.4, label=results[0])
    for i, name in enumerate(results[1:], start=1):
        marker = "*" if name == results[-1] else "o"
        axes.plot(
            share[:, i], at, marker, ms=7, alpha=0.7, color=f"C{i}", clip_on=False, label=name
        )
    labels = [
        f"{_short(names[found.labels[p]])} → {_short(names[found.answers[p]])}" for p in pairs
    ]
    axes.set_yticks(at, labels, size=8, parse_math=False)
    axes.invert_yaxis()
    axes.set(xlabel="% of the label's images", title="most frequent confusions, label → answer")
    axes.grid(axis="x", alpha=0.3)
    bars_first = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=_is_mark)
    axes.legend(
        *zip(*bars_first, strict=True), loc="upper left", bbox_to_anchor=(1, 1), title="size"
    )


def _is_mark(handle_and_label: tuple[object, str]) -> bool:
    return isinstance(handle_and_label[0], Line2D)


def _short(name: str) -> str:
    text = printable(name)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"

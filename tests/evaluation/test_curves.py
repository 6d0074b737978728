"""A training's curves, from lines of metrics that the test writes."""

from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure

from rsnet.evaluation.curves import POINTS, curves_of, plot_curves, read_metrics

SIZES = ("224", "160", "96")


def _rows(epochs: int = 3, steps: int = 4) -> list[dict]:
    rows = []
    for epoch in range(epochs):
        for step in range(1, steps + 1):
            ce = {f"train/ce/{s}": 3.0 / (epoch + 1) for s in (*SIZES, "ensemble")}
            rows.append({"epoch": epoch + step / steps, "lr": 0.1 / (epoch + 1), **ce})
        top1 = {f"val/top1@{s}": 10.0 * epoch + len(s) for s in (*SIZES, "ensemble")}
        loss = {f"val/loss@{s}": 2.0 / (epoch + 1) for s in (*SIZES, "ensemble")}
        rows.append({"epoch": epoch + 1, **top1, **loss})
    return rows


@pytest.fixture
def drawn(drawn_plots, monkeypatch):  # noqa: ARG001
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self, *arguments, **options):
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_a_metric_s_curve_has_all_its_points_and_lines_that_a_crash_cut_short_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row) for row in _rows(1, 2)]
    path.write_text("\n".join([lines[0], '{"epoch": 0.7, "lr"', "[]", *lines[1:]]))
    curves = curves_of(read_metrics(path))
    assert curves["lr"] == ([0.5, 1.0], [0.1, 0.1])
    assert curves["val/top1@96"] == ([1], [2.0])
    assert read_metrics(tmp_path / "none") == []


def test_losses_accuracies_and_learning_rate_are_drawn_over_epochs(tmp_path, drawn):
    plot_curves(tmp_path / "curves.png", "net", _rows())
    losses, accuracy, rate = drawn[0].axes
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [line.get_ydata()[-1] for line in losses.lines] == pytest.approx([1.0, 2 / 3] * 3)
    top1 = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
    assert list(top1)[:4] == [*SIZES, "ensemble"]
    assert top1["160"] == [3, 13, 23]
    assert list(rate.lines[0].get_xdata()) == [epoch / 4 for epoch in range(1, 13)]
    assert [axes.get_ylabel() for axes in drawn[0].axes] == [
        "cross-entropy", "top-1 %", "learning rate",
    ]  # fmt: skip


def test_a_training_by_binary_cross_entropy_has_its_curves_on_an_axis_of_their_own(tmp_path, drawn):
    rows = [
        {key.replace("train/ce/", "train/bce/"): v for key, v in row.items()} for row in _rows()
    ]
    plot_curves(tmp_path / "curves.png", "net", rows)
    losses, _, _, binary = drawn[0].axes
    assert [line.get_ydata()[-1] for line in binary.lines] == pytest.approx([1.0] * len(SIZES))
    assert [line.get_ydata()[-1] for line in losses.lines] == pytest.approx([2 / 3] * len(SIZES))
    assert binary.get_ylabel() == "binary cross-entropy, training"


def test_the_legend_stands_beside_the_curves_and_no_label_on_another(tmp_path, drawn):
    rows = _rows()
    for size in range(32, 480, 32):
        rows.append({"epoch": 3, f"val/top1@{size}": 50.0, f"train/ce/{size}": 1.0})
    plot_curves(tmp_path / "curves.png", "net", rows)
    (figure,) = drawn
    figure.draw_without_rendering()  # at its own resolution again, which the saved file had not
    (legend,) = figure.legends
    assert (
        len(legend.get_texts()) == len(range(32, 480, 32)) + 3
    )  # the ensemble, and two kinds of lines
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    boxes += [text.get_window_extent() for text in legend.get_texts()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_long_training_has_as_many_points_as_can_be_told_apart(tmp_path, drawn):
    plot_curves(tmp_path / "curves.png", "net", _rows(steps=1001))
    (line, *_) = drawn[0].axes[0].lines
    assert POINTS / 2 < len(line.get_xdata()) <= POINTS

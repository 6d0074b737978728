"""Labels of points that lie close together."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from rsnet.evaluation.plot_labels import label_points


def _labels(points) -> list:
    axes = Figure(figsize=(4, 3), layout="constrained").subplots()
    axes.plot([x for _, x, _ in points], [y for _, _, y in points], "o")
    label_points(axes, points)
    return axes.texts


@pytest.mark.usefixtures("drawn_plots")
def test_no_label_lies_on_another():
    points = [(str(i), i / 100, (i * 37 % 100) / 100) for i in range(100)]
    texts = _labels(points)
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) > 30
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.usefixtures("drawn_plots")
def test_the_same_label_is_not_repeated_beside_itself():
    assert [t.get_text() for t in _labels([("32", 0, 0), ("32", 0, 1e-3), ("32", 1, 1)])] == [
        "32", "32",
    ]  # fmt: skip

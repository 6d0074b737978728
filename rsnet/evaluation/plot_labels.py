"""Labels of points in a plot, placed so that none lies on another."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

# Where a label may stand, in points from its own, and how it is aligned there.
PLACES = (
    ((4, -4), "left", "top"),
    ((4, 4), "left", "bottom"),
    ((-4, 4), "right", "bottom"),
    ((-4, -4), "right", "top"),
)


def label_points(axes: Axes, points: Iterable[tuple[str, float, float]], size: float = 8) -> None:
    """Label points (text, x, y), all of which are drawn, where there is room, the first ones first.

    A label that would stand beside the same text, or has no room, is left out.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # lays out the axes, on which the places depend
    taken: list[tuple[str, Bbox]] = []
    for text, x, y in points:
        for offset, horizontal, vertical in PLACES:
            label = axes.annotate(
                text, (x, y), textcoords="offset points", xytext=offset, size=size,
                ha=horizontal, va=vertical,
            )  # fmt: skip
            box = label.get_window_extent()
            near = box.expanded(1.0, 3.0)
            if any(other == text and near.overlaps(its) for other, its in taken):
                label.remove()
                break
            if not any(box.overlaps(its) for _, its in taken):
                taken.append((text, box))
                break
            label.remove()

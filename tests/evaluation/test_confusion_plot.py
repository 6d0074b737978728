"""The plot of a confusion matrix: which classes and pairs it shows, and whatever they are called."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rsnet.evaluation import confusion_plot
from rsnet.evaluation.confusion_plot import CLASSES, PAIRS
from rsnet.evaluation.metrics import Confusion


def _confusion(classes: int, pairs: int) -> Confusion:
    """All classes are right half of the time; `pairs` are confused, the first the most."""
    of_pair = np.arange(pairs)
    labels = np.concatenate([of_pair, np.arange(classes)])
    answers = np.concatenate([(of_pair + 1) % classes, np.arange(classes)])
    counts = np.concatenate([np.linspace(20, 1, pairs).astype(int), np.full(classes, 25)])
    return Confusion(labels, answers, np.stack([counts, counts // 2], 1), np.full(len(labels), 50))


def test_a_few_classes_are_all_in_the_matrix():
    classes, is_all = confusion_plot._chosen_classes(_confusion(5, 3))
    assert (classes.tolist(), is_all) == ([0, 1, 2, 3, 4], True)


def test_of_a_thousand_classes_the_matrix_has_those_of_the_most_frequent_confusions():
    found = _confusion(1000, 600)
    classes, is_all = confusion_plot._chosen_classes(found)
    assert not is_all
    assert classes.tolist() == list(range(CLASSES))


@pytest.mark.usefixtures("drawn_plots")
def test_the_plot_shows_names_shares_and_pairs(tmp_path, monkeypatch):
    figures = []
    figure_type = confusion_plot.Figure
    monkeypatch.setattr(
        confusion_plot, "Figure", lambda **k: figures.append(figure_type(**k)) or figures[-1]
    )
    names = [f"class {i}" for i in range(1000)]
    names[0] = "a very long name, of which the end would not fit into any plot at all"
    confusion_plot.plot(tmp_path / "x.png", "net", _confusion(1000, 600), ["64", "ensemble"], names)
    matrix, pairs = figures[0].axes
    shown = [label.get_text() for label in matrix.get_yticklabels()]
    assert shown == ["a very long name, of which …", *names[1:CLASSES]]
    assert {text.get_text() for text in matrix.texts} >= {"50", "40"}
    assert [label.get_text() for label in pairs.get_yticklabels()][1] == "class 1 → class 2"
    assert len(pairs.patches) == PAIRS
    assert pairs.patches[0].get_width() == 40
    assert [text.get_text() for text in pairs.get_legend().get_texts()] == ["64", "ensemble"]
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (1500, 750)


@pytest.mark.usefixtures("drawn_plots")
def test_no_name_breaks_the_plot(tmp_path):
    names = ["$x^$ {", "日本", "\udcff", "a\nb", "\\frac"]
    confusion_plot.plot(tmp_path / "x.png", "$_", _confusion(5, 4), ["64", "48"], names)
    nothing_wrong = _confusion(5, 0)
    confusion_plot.plot(tmp_path / "y.png", "net", nothing_wrong, ["64", "48"], names)
    assert (tmp_path / "y.png").stat().st_size > 0


def test_of_many_classes_without_a_confusion_the_matrix_has_the_first():
    classes, is_all = confusion_plot._chosen_classes(_confusion(100, 0))
    assert (classes.tolist(), is_all) == (list(range(CLASSES)), False)

"""Predictions and their figures against plain numpy, and the files that are written of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from pipelines.batch import Batch
from pipelines.utils.errors import RunError
from rsnet.distributed import process_group
from rsnet.evaluation import metrics
from rsnet.evaluation.detailed import _write_csv
from rsnet.evaluation.evaluate import evaluate
from rsnet.evaluation.label_sets import match_classes
from rsnet.evaluation.predictions import Predictions, predict, write_parquet

CPU = torch.device("cpu")
SIZES, N, C = (64, 48, 32), 37, 9
NAMES = ("64", "48", "32", "ensemble")
CLASSES = [f"class{i}" for i in range(C)]


class _Model(nn.Module):
    """Gives back the logits that are passed as images."""

    sizes = SIZES

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([0.3, 1.7, -0.5]))
        self.quantizer = nn.Identity()

    def forward_all(self, images):
        return tuple(images)


@pytest.fixture(autouse=True)
def _not_folded(monkeypatch):
    monkeypatch.setattr("rsnet.evaluation.evaluate.is_foldable", lambda _: False)


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    """(3, N, C)"""
    return 3 * torch.randn(len(SIZES), N, C, generator=torch.Generator().manual_seed(7))


def _loader(logits, labels, batch=8):
    class Loader(list):
        sample_names = [f"image{i}" for i in range(len(labels))]  # noqa: RUF012

    return Loader(
        Batch(tuple(logits[:, i : i + batch]), labels[i : i + batch])
        for i in range(0, len(labels), batch)
    )


def _labels(classes: int) -> torch.Tensor:
    return torch.randint(0, classes, (N,), generator=torch.Generator().manual_seed(8))


def _every(logits) -> np.ndarray:
    """(N, 4, C): the sizes' and the ensemble's logits, in float64."""
    z = logits.double().numpy()
    w = np.exp([0.3, 1.7, -0.5]) / np.exp([0.3, 1.7, -0.5]).sum()
    return np.concatenate([z, (w[:, None, None] * z).sum(axis=0, keepdims=True)]).swapaxes(0, 1)


def _softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


def test_the_answers_are_those_of_numpy_and_the_results_those_of_a_training(logits):
    labels = _labels(C)
    seen: list[int] = []
    found, results = predict(
        _Model(), _loader(logits, labels), match_classes(CLASSES, CLASSES, C), CPU, None,
        keep_logits=True, on_images=seen.append,
    )  # fmt: skip
    assert seen == [8, 16, 24, 32, 37]
    every = _every(logits)
    order = np.argsort(-every, axis=2)[:, :, :5]
    assert found.names == NAMES
    assert found.paths[-1] == "image36"
    assert np.array_equal(found.labels[:, 0], labels)
    assert np.array_equal(found.classes, order)
    expected = np.take_along_axis(_softmax(every), order, axis=2)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-5)
    np.testing.assert_allclose(found.logits, every, rtol=1e-5, atol=1e-5)
    assert results == evaluate(_Model(), _loader(logits, labels), CPU)
    for i, name in enumerate(NAMES):
        top1 = 100 * (order[:, i, 0] == labels.numpy()).mean()
        assert results[name]["top1"] == pytest.approx(top1)
    counted = metrics.accuracies(found)
    for name in NAMES:
        assert counted[name]["top1"] == pytest.approx(results[name]["top1"])
        assert counted[name]["top5"] == pytest.approx(results[name]["top5"])


def test_of_some_classes_the_likeliest_of_the_subset_counts(logits):
    data = ["class7", "class2", "class4"]
    labels = _labels(3)
    found, results = predict(
        _Model(), _loader(logits, labels), match_classes(data, CLASSES, C), CPU, None
    )
    outputs = np.array([7, 2, 4])
    every = _every(logits)[:, :, outputs]
    order = np.argsort(-every, axis=2)
    assert np.array_equal(found.labels[:, 0], outputs[labels])
    assert np.array_equal(found.classes, outputs[order])
    probabilities = _softmax(every)
    expected = np.take_along_axis(probabilities, order, axis=2)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-5)
    for i, name in enumerate(NAMES):
        of_label = probabilities[np.arange(N), i, labels]
        assert results[name]["loss"] == pytest.approx(-np.log(of_label).mean(), rel=1e-5)
        top1 = 100 * (order[:, i, 0] == labels.numpy()).mean()
        assert results[name]["top1"] == pytest.approx(top1)
        assert results[name]["top5"] == 100


def test_outputs_that_are_not_finite_are_an_error_that_names_image_and_size(logits):
    broken = logits.clone()
    broken[1, 20, 3] = torch.nan
    with pytest.raises(RunError, match="image20: outputs at size 48 are not finite"):
        predict(
            _Model(), _loader(broken, _labels(C)), match_classes(CLASSES, CLASSES, C), CPU, None
        )


def test_the_parts_of_ranks_are_joined_in_their_order_and_one_may_be_empty(logits, monkeypatch):
    labels = _labels(C)
    match = match_classes(CLASSES, CLASSES, C)
    whole, _ = predict(_Model(), _loader(logits, labels), match, CPU, None)
    parts: list[list[np.ndarray]] = []
    monkeypatch.setattr(process_group, "gather_object", lambda part: parts.append(part) or [part])
    loader = _loader(logits, labels)
    for share in (loader[:2], loader[2:]):
        share = type(loader)(share)
        predict(_Model(), share, match, CPU, None)
    monkeypatch.setattr(process_group, "gather_object", lambda _: [parts[0], [], parts[1]])
    joined, _ = predict(_Model(), loader, match, CPU, None)
    for name in ("labels", "classes", "probabilities"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name))


@pytest.fixture(scope="module")
def random() -> Predictions:
    rng = np.random.default_rng(3)
    classes = np.argsort(rng.random((500, 4, 7)), axis=2)[:, :, :5]
    probabilities = np.sort(rng.dirichlet(np.ones(7), (500, 4)), axis=2)[:, :, :1:-1]
    return Predictions(
        NAMES, tuple(f"i{i}" for i in range(500)), rng.integers(0, 6, (500, 1)), classes,
        probabilities.astype(np.float32),
    )  # fmt: skip


def _ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """Of Guo et al. 2017, bin by bin."""
    total = 0.0
    for b in range(15):
        inside = (confidence * 15 >= b) & ((confidence * 15 < b + 1) | (b == 14))
        if inside.any():
            total += inside.sum() * abs(confidence[inside].mean() - right[inside].mean())
    return 100 * total / len(right)


def test_the_calibration_error_is_that_of_fifteen_bins(random):
    found = metrics.calibration_errors(random)
    for i, name in enumerate(NAMES):
        right = (random.classes[:, i, 0] == random.labels[:, 0]).astype(float)
        confidence = random.probabilities[:, i, 0].astype(float)
        assert found[name] == pytest.approx(_ece(confidence, right), rel=1e-6)


def test_a_probability_of_one_is_in_the_last_bin_unlike_torchmetrics():
    from torchmetrics.functional.classification import binary_calibration_error

    confidence, right = torch.tensor([1.0, 0.95]), torch.tensor([0, 1])
    expected = _ece(confidence.double().numpy(), right.numpy())
    assert metrics.calibration_error(confidence, right) == pytest.approx(expected)
    assert expected == pytest.approx(47.5)
    theirs = 100 * binary_calibration_error(confidence, right, n_bins=15)
    assert theirs == pytest.approx(52.5)


def test_accuracy_by_class_is_counted_by_label(random):
    found = metrics.class_accuracy(random, 8)
    for c in range(8):
        of_class = random.labels[:, 0] == c
        assert found.images[c] == of_class.sum()
        for i in range(4):
            share = 100 * (random.classes[of_class, i, 0] == c).mean() if of_class.any() else np.nan
            np.testing.assert_allclose(found.top1[c, i], share)


def test_confusions_are_counted_by_pair_the_most_frequent_first(random):
    found = metrics.confusion(random)
    matrices = np.zeros((4, 7, 7), int)
    for label, answers in zip(random.labels[:, 0], random.classes[:, :, 0], strict=True):
        for i, answer in enumerate(answers):
            matrices[i, label, answer] += 1
    again = np.zeros_like(matrices)
    for label, answer, counts in zip(found.labels, found.answers, found.counts, strict=True):
        again[:, label, answer] += counts
    assert np.array_equal(again, matrices)
    assert np.array_equal(found.images, np.bincount(random.labels[:, 0])[found.labels])
    wrong = found.counts[found.wrong, 0]
    assert (found.labels[found.wrong] != found.answers[found.wrong]).all()
    assert wrong[0] == max(matrices[0][~np.eye(7, dtype=bool)])
    assert (np.diff(wrong) <= 0).all()
    assert wrong.sum() == 500 - np.trace(matrices[0])


def test_hard_images_are_those_that_no_size_or_only_a_smaller_one_classifies(random):
    right = random.classes[:, :, 0] == random.labels
    for i in range(500):
        largest, *smaller = right[i, :3]
        assert (i in metrics.wrong_at_every_size(random)) == (not right[i, :3].any())
        assert (i in metrics.right_only_when_small(random)) == (not largest and any(smaller))


def test_of_several_labels_each_is_right_and_images_without_are_left_out(random):
    labels = np.full((500, 3), -1)
    labels[:, 0], labels[::2, 1] = random.classes[:, 0, 0], random.classes[::2, 1, 0]
    labels[100:] = -1
    some = random.with_labels(labels)
    assert some.paths == random.paths[:100]
    expected = [
        any(some.classes[i, r, 0] == label for label in labels[i]) for i in range(100) for r in range(4)
    ]  # fmt: skip
    assert some.hits[:, :, 0].ravel().tolist() == expected
    results = metrics.accuracies(some)
    assert results["64"]["top1"] == 100
    top5 = [bool(set(some.classes[i, 2]) & set(labels[i])) for i in range(100)]
    assert results["32"]["top5"] == pytest.approx(100 * np.mean(top5))
    counted = metrics.class_accuracy(some, 7)
    assert counted.images.sum() == (labels[:100] >= 0).sum()


def test_parquet_has_a_row_per_image_with_answers_or_logits(random, tmp_path, logits):
    write_parquet(tmp_path / "p.parquet", random, ["a\udcff", *"bcdefg"], {"data": "x"})
    table = pq.read_table(tmp_path / "p.parquet")
    assert table["path"].to_pylist() == list(random.paths)
    assert table["label"].to_pylist() == random.labels[:, 0].tolist()
    assert table["classes@48"].to_pylist() == random.classes[:, 1].tolist()
    assert table["probabilities@ensemble"].to_pylist() == random.probabilities[:, 3].tolist()
    about = json.loads(table.schema.metadata[b"rsnet"])
    assert about == {"data": "x", "classes": ["a\\udcff", *"bcdefg"]}
    labels = _labels(C)
    found, _ = predict(
        _Model(), _loader(logits, labels), match_classes(CLASSES, CLASSES, C), CPU, None,
        keep_logits=True,
    )  # fmt: skip
    several = found.with_labels(np.array([[1, 2]] * 20 + [[3, -1]] * 17))
    write_parquet(tmp_path / "q.parquet", several, CLASSES, {})
    table = pq.read_table(tmp_path / "q.parquet")
    assert table.column_names == ["path", "label", *(f"logits@{name}" for name in NAMES)]
    assert table["logits@64"].to_pylist() == logits[0].tolist()
    assert table["label"].to_pylist() == [[1, 2]] * 20 + [[3]] * 17


def test_the_manuals_example_reads_the_answers(random, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    monkeypatch.chdir(tmp_path)
    at_224 = replace(random, names=("224", *NAMES[1:]))
    write_parquet(Path("answers.parquet"), at_224, [*"abcdefg"], {})
    exec(example, {})
    names = ["abcdefg"[i] for i in random.classes[0, 0]]
    assert capsys.readouterr().out == f"i0 {names}\n"


def test_a_single_class_is_a_confusion_matrix_too(random):
    alone = replace(
        random, labels=np.full((500, 1), 3), classes=np.full((500, 4, 1), 3),
        probabilities=np.ones((500, 4, 1), np.float32),
    )  # fmt: skip
    found = metrics.confusion(alone)
    assert (found.labels.tolist(), found.answers.tolist()) == ([3], [3])
    assert found.counts.tolist() == [[500] * 4]
    assert found.images.tolist() == [500]
    assert len(found.wrong) == 0
    assert metrics.calibration_errors(alone) == dict.fromkeys(NAMES, 0.0)


def test_a_files_name_that_is_no_text_is_written_as_it_is_and_as_text_into_parquet(tmp_path):
    _write_csv(tmp_path / "a.csv", [["a\udcff.jpg", 1]])
    assert (tmp_path / "a.csv").read_bytes() == b"a\xff.jpg,1\r\n"

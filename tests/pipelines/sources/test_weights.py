"""Weights in the loss and balanced sampling, by hand."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines import dali, ffcv, reference
from pipelines.batch import LoaderSpec
from pipelines.sampler import make_schedule
from pipelines.sources import manifest
from pipelines.sources.weights import loss_weights
from pipelines.utils.errors import DataError, UsageError
from tests.conftest import beton_of, needs_ffcv, write_folder
from tests.pipelines.sources.conftest import rows_of, write_table

LABELS = np.array([0, 0, 0, 1])


def test_balanced_classes_weigh_the_same_as_in_scikit_learn():
    """n / (classes x images of the class): 4 / (2 x 3), 4 / (2 x 1)."""
    weights = loss_weights(LABELS, ["ant", "bee"], None, "balanced")
    np.testing.assert_allclose(weights, [4 / 6, 4 / 6, 4 / 6, 2])


def test_a_samples_weight_is_its_own_times_its_classs_with_mean_1(tmp_path):
    (tmp_path / "w.json").write_text('{"ant": 1, "bee": 3}')
    own = np.array([1.0, 2.0, 1.0, 2.0])
    weights = loss_weights(LABELS, ["ant", "bee"], own, str(tmp_path / "w.json"))
    np.testing.assert_allclose(weights, np.array([1, 2, 1, 6]) / 2.5)
    np.testing.assert_allclose(loss_weights(LABELS, ["ant", "bee"], own, None), own / 1.5)
    assert loss_weights(LABELS, ["ant", "bee"], None, None) is None
    # Drawn as often as each other, ants weigh 4 / 3 on average, the bee 6.
    weights = loss_weights(LABELS, ["ant", "bee"], own, str(tmp_path / "w.json"), balanced=True)
    np.testing.assert_allclose(weights, np.array([1, 2, 1, 6]) / ((4 / 3 + 6) / 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"ant": 1}', UsageError, "has no weight of bee"),
        (
            '{"ant": 1, "bee": 2, "cat": 1}',
            UsageError,
            "weights of classes that the data has not: cat",
        ),
        ('{"ant": 1, "bee": 0}', DataError, "an object of weights above 0"),
        ("[1, 2]", DataError, "must be an object"),
        ("{", DataError, r"w\.json is damaged"),
    ],
)
def test_a_mistake_in_a_file_of_weights_is_one_line(tmp_path, content, error, message):
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(error, match=message):
        loss_weights(LABELS, ["ant", "bee"], None, str(tmp_path / "w.json"))
    with pytest.raises(UsageError, match="--class-weights: there is no file"):
        loss_weights(LABELS, ["ant", "bee"], None, str(tmp_path / "none.json"))


def spec_of(data, **options) -> LoaderSpec:
    return LoaderSpec(data, (32, 24), 4, torch.device("cpu"), **options)


@pytest.mark.parametrize("make", [
    lambda spec: dali.make_loaders(dali.DaliOptions(workers=2), spec),
    lambda spec: reference.make_loaders(reference.ReferenceOptions(), spec),
])  # fmt: skip
def test_a_tables_weights_come_with_their_samples_in_training_alone(photos, make):
    rows = [
        {**row, "weight": 1 + 2 * (row["label"] == "bee")} for row in rows_of(photos, photos.parent)
    ]
    data = write_table(photos.with_name("weighted.csv"), rows)
    loaders = make(spec_of(data))
    for batch in loaders.train:
        assert batch.weights is not None
        ratio = batch.weights / batch.weights.min()
        assert {round(r.item()) for r in ratio[batch.labels == 1]} <= {1, 3}
        assert len(set(batch.weights[batch.labels != 1].tolist())) <= 1
    assert next(iter(loaders.val)).weights is None
    loaders.close()


def test_a_weight_that_is_none_is_named(photos):
    rows = [{**row, "weight": -1.0} for row in rows_of(photos, photos.parent)]
    data = write_table(photos.with_name("negative.csv"), rows)
    with pytest.raises(UsageError, match=r"row 1 has the weight -1; above 0"):
        manifest.read(data, "train")


@needs_ffcv
def test_classes_weigh_the_same_by_ffcv(photos):
    def by_ffcv(spec):
        with contextlib.closing(ffcv.make_loaders(ffcv.FfcvOptions(workers=2), spec)) as loaders:
            return list(loaders.train)

    weighted = {"class_weights": "balanced", "seed": 4}
    by_dali = dali.make_loaders(dali.DaliOptions(workers=2), spec_of(photos, **weighted)).train
    batches = list(by_dali), by_ffcv(spec_of(beton_of(photos), **weighted))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.weights, other.weights)
        counts = torch.tensor([9.0, 8, 6])
        torch.testing.assert_close(one.weights, 23 / 3 / counts[one.labels])
    spec = spec_of(beton_of(photos), balanced_sampling=True)
    with pytest.raises(UsageError, match="--balanced-sampling: with --order random alone"):
        ffcv.make_loaders(ffcv.FfcvOptions(order="quasi-random"), spec)
    drawn = Counter(row for batch in by_ffcv(spec) for row in batch.labels.tolist())
    assert max(drawn.values()) <= 8  # of 23 images of three classes


@pytest.fixture
def unbalanced():
    """A schedule of 100 samples: 80, 15 and 5 of a class."""
    labels = np.repeat([0, 1, 2], [80, 15, 5])
    spec = spec_of(None, balanced_sampling=True)
    return labels, lambda **more: make_schedule(replace(spec, **more), 100, True, labels)


def test_an_epoch_has_as_many_samples_of_each_class(unbalanced):
    labels, make = unbalanced
    for epoch in range(3):
        order = make().order(epoch)
        counts = Counter(labels[make().rows(order)].tolist())
        assert len(order) == 100
        assert set(counts.values()) == {33, 34}
        assert len(set(order.tolist())) == 100  # another crop for each repetition
        times = Counter(make().rows(order)[labels[make().rows(order)] == 2].tolist())
        assert set(times.values()) <= {6, 7}  # of 33 or 34 draws of five samples
    assert not np.array_equal(make().order(0), make().order(1))


def test_balanced_batches_do_not_depend_on_the_processes(unbalanced):
    _, make = unbalanced
    whole = [list(b) for b in make(batch_size=8).batches(2)]
    parts = [list(make(rank=r, world_size=2).batches(2)) for r in (0, 1)]
    assert whole == [[*a, *b] for a, b in zip(*parts, strict=True)]


def test_a_sample_drawn_again_has_another_crop(tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / split, {"ant": 10, "bee": 1})
    spec = spec_of(tmp_path, balanced_sampling=True)
    batches = list(dali.make_loaders(dali.DaliOptions(workers=2), spec).train)
    bees = torch.cat([b.images[0][b.labels == 1] for b in batches])
    assert len(bees) >= 3
    assert len({bee.numpy().tobytes() for bee in bees}) == len(bees)
    same = list(reference.make_loaders(reference.ReferenceOptions(), spec).train)
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(batches, same, strict=True))


def test_a_run_is_not_resumed_with_another_sampling(photos):
    plain = dali.make_loaders(dali.DaliOptions(workers=2), spec_of(photos)).train
    balanced = dali.make_loaders(
        dali.DaliOptions(workers=2), spec_of(photos, balanced_sampling=True)
    ).train
    with pytest.raises(UsageError, match="order random, this run's balanced"):
        balanced.load_state_dict(json.loads(json.dumps(plain.state_dict())))

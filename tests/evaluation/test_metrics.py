"""Counters against counting by hand."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rsnet.evaluation.evaluate import Accuracy
from rsnet.evaluation.metrics import confusion
from rsnet.training.loss_meter import LossMeter
from rsnet.training.nonfinite import FiniteGuard

CPU = torch.device("cpu")


def test_accuracy_counts_every_sample_once_whatever_the_batches():
    sizes, n, classes = (64, 32), 37, 11
    logits = [torch.randn(n, classes) for _ in sizes]
    labels = torch.randint(0, classes, (n,))
    alpha = torch.tensor([0.3, 1.7])
    accuracy = Accuracy(sizes, CPU)
    for part in torch.split(torch.arange(n), 8):
        accuracy.add([z[part] for z in logits], labels[part], alpha)
    results = accuracy.compute()

    w = [math.exp(a) / sum(map(math.exp, alpha.tolist())) for a in alpha.tolist()]
    every = {"64": logits[0], "32": logits[1], "ensemble": w[0] * logits[0] + w[1] * logits[1]}
    assert list(results) == list(every)
    for name, z in every.items():
        ranks = [
            sorted(row, reverse=True).index(row[y])
            for row, y in zip(z.tolist(), labels, strict=True)
        ]
        losses = [-(row[y] - row.logsumexp(0)).item() for row, y in zip(z, labels, strict=True)]
        assert results[name]["top1"] == pytest.approx(100 * sum(r == 0 for r in ranks) / n)
        assert results[name]["top5"] == pytest.approx(100 * sum(r < 5 for r in ranks) / n)
        assert results[name]["loss"] == pytest.approx(sum(losses) / n, rel=1e-5)


def test_top5_of_fewer_classes_is_all_of_them():
    accuracy = Accuracy((32,), CPU)
    accuracy.add([torch.randn(4, 3)], torch.tensor([0, 1, 2, 0]), torch.ones(1))
    assert accuracy.compute()["32"]["top5"] == 100


def test_term_means_start_anew_after_each_reading():
    means = LossMeter()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    means.add({"a": torch.tensor(3.0), "b": torch.tensor(7.0)})
    assert means.compute() == {"a": 2, "b": 6}
    means.add({"a": torch.tensor(10.0), "b": torch.tensor(0.0)})
    assert means.compute() == {"a": 10, "b": 0}


def test_a_term_that_some_steps_lack_is_averaged_over_those_that_have_it():
    means = LossMeter()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    means.add({"a": torch.tensor(4.0), "c": torch.tensor(7.0)})
    means.add({"a": torch.tensor(4.0), "c": torch.tensor(9.0)})
    assert means.compute() == {"a": 3, "b": 5, "c": 8}


def test_the_guard_names_the_terms_of_the_bad_step_whatever_others_had():
    guard = FiniteGuard(CPU)
    inf = torch.tensor(torch.inf)
    good = torch.tensor(1.0)
    for step, (at_64, other, is_left_out) in enumerate(
        [(good, {"ce/32": good}, 0), (good, {"ce/16": inf}, 1), (inf, {"ce/32": inf}, 1)]
    ):
        assert guard.check({"ce/64": at_64, **other}) == is_left_out
        guard.close(step)
    assert guard.verdict() == (1, ["ce/16"])


def test_a_bad_batch_spoils_the_whole_update():
    guard = FiniteGuard(CPU, most=1)
    assert [guard.check({"ce": torch.tensor(x)}).item() for x in (1.0, torch.nan, 1.0)] == [0, 1, 1]
    guard.close(0)
    assert guard.check({"ce": torch.tensor(1.0)}) == 0
    assert guard.skipped() == 1


def test_so_many_updates_in_a_row_may_be_left_out_and_not_one_more():
    guard = FiniteGuard(CPU, most=2)
    nan, good = {"ce": torch.tensor(torch.nan)}, {"ce": torch.tensor(1.0)}
    for step, terms in enumerate([nan, nan, good, nan, nan, nan, good]):
        left_out = guard.check(terms)
        assert left_out == (terms is nan or step > 5)
        guard.close(step)
        assert (guard.verdict() is None) == (step < 5)
    assert guard.verdict() == (5, ["ce"])
    again = FiniteGuard(CPU, most=2)
    again.load([2, 7])
    again.check(nan)
    again.close(9)
    assert again.verdict() == (9, ["ce"])


def test_means_leave_out_what_is_not_finite():
    means = LossMeter()
    for value in (1.0, torch.nan, 4.0, torch.inf):
        means.add({"a": torch.tensor(value), "b": torch.tensor(1.0)})
    state = means.state()
    assert means.compute() == {"a": 2.5, "b": 1}
    again = LossMeter()
    again.load(state, CPU)
    again.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    assert again.compute() == {"a": 2, "b": 1.8}


def test_the_guard_names_the_first_step_and_its_terms():
    guard = FiniteGuard(CPU)
    good = {"ce/64": torch.tensor(1.0), "kd": torch.tensor(2.0)}
    bad = good | {"kd": torch.tensor(torch.inf)}
    other = good | {"ce/64": torch.tensor(torch.nan)}
    for step, (terms, is_left_out) in enumerate([(good, 0), (bad, 1), (good, 1), (other, 1)]):
        assert guard.check(terms) == is_left_out
        guard.close(step)
        assert (guard.verdict() is None) == (step == 0)
    assert guard.verdict() == (1, ["kd"])


@pytest.mark.parametrize("classes", [1, 2, 30, 20_000])
def test_confusions_are_the_pairs_of_the_matrix_that_occur_the_most_frequent_first(classes):
    """20,000 classes: a matrix would take 3.2 GB for each size."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, (200, 1))
    is_right = rng.random((200, 3)) < 0.4
    answers = np.where(is_right, labels, rng.integers(0, min(classes, 4), (200, 3)))
    found = confusion(SimpleNamespace(classes=answers[:, :, None], labels=labels))
    expected = {
        (label, answer): [0, 0, 0]
        for label, row in zip(labels[:, 0].tolist(), answers.tolist(), strict=True)
        for answer in row
    }
    for label, row in zip(labels[:, 0].tolist(), answers.tolist(), strict=True):
        for place, answer in enumerate(row):
            expected[label, answer][place] += 1
    pairs = list(zip(found.labels.tolist(), found.answers.tolist(), strict=True))
    assert dict(zip(pairs, found.counts.tolist(), strict=True)) == expected
    assert len(pairs) == len(expected)
    images = Counter(labels[:, 0].tolist())
    assert found.images.tolist() == [images[label] for label, _ in pairs]
    wrong = [found.counts[i, 0] for i in found.wrong]
    assert wrong == sorted(wrong, reverse=True)


def test_a_guard_names_what_was_not_finite_in_the_updates_that_were_too_many():
    guard = FiniteGuard(CPU, most=1)
    good, bad = {"ce": torch.tensor(1.0)}, {"ce": torch.tensor(torch.nan)}

    def update(step, terms, norm):
        guard.check(terms)
        guard.check_gradients(torch.tensor(norm))
        guard.close(step)

    update(0, bad, 1.0)
    update(1, good, 1.0)
    update(2, good, torch.inf)
    assert guard.verdict() is None
    update(3, good, torch.nan)
    update(4, good, 1.0)  # before anybody looks
    assert guard.verdict() == (3, ["a gradient"])

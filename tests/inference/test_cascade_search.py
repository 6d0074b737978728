"""Cascades on recorded answers: simulated image by image, and searched among all that a grid has."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rsnet.inference import cascade_search as thresholds
from rsnet.inference.calibration import LabelledLogits
from rsnet.inference.cascade import CascadeStage
from rsnet.inference.cascade_search import Answers, Outcome, choose

SIZES, MS = (32, 48, 64), {64: 5.0, 48: 2.0, 32: 1.0}


IMAGES = 60


@pytest.fixture(scope="module")
def found() -> Answers:
    """Confident answers are right more often, and larger sizes are. Some are as confident as others."""
    rng = np.random.default_rng(2)
    confidence = {size: rng.uniform(0.2, 1.0, IMAGES).round(2) for size in SIZES}
    right = {
        s: (rng.uniform(size=IMAGES) < c * (0.6 + s / 150)).astype(float)
        for s, c in confidence.items()
    }
    return Answers(confidence, right)


def _by_hand(found: Answers, cascade) -> tuple[float, float, dict[int, float]]:
    """Accuracy in %, ms an image, and % of the images by the size that decides; image by image."""
    right, ms, decided = 0.0, 0.0, {step.size: 0.0 for step in cascade}
    for i in range(IMAGES):
        for size, threshold in cascade:
            ms += MS[size]
            if size == cascade[-1].size or found.confidence[size][i] >= threshold:
                right += found.right[size][i]
                decided[size] += 100 / IMAGES
                break
    return 100 * right / IMAGES, ms / IMAGES, decided


CASCADES = [
    (CascadeStage(48),),
    (CascadeStage(32, 0.35), CascadeStage(64)),  # an image's confidence at 32
    (CascadeStage(32, 0.5), CascadeStage(64)),
    (CascadeStage(32, 0.7), CascadeStage(48, 0.4), CascadeStage(64)),
    (CascadeStage(32, 0.0), CascadeStage(64)),
    (CascadeStage(32, 1.0), CascadeStage(48, 1.0), CascadeStage(64, 1.0)),
]


@pytest.mark.parametrize("cascade", CASCADES)
def test_a_cascade_is_simulated_as_its_images_go_through_it(found, cascade):
    top1, ms, decided = _by_hand(found, cascade)
    outcome = thresholds.simulate(found, cascade, MS)
    assert (outcome.top1, outcome.ms) == (pytest.approx(top1), pytest.approx(ms))
    assert thresholds.shares(found, cascade) == pytest.approx(decided)


@pytest.fixture(scope="module")
def frontier(found):
    return thresholds.search(found, MS)


def test_what_the_search_says_of_a_cascade_is_what_it_does(found, frontier):
    for outcome in frontier:
        again = thresholds.simulate(found, outcome.cascade, MS)
        assert (again.top1, again.ms) == (pytest.approx(outcome.top1), pytest.approx(outcome.ms))


def test_no_size_and_no_cascade_beats_the_one_that_is_chosen(found, frontier):
    """Chosen on some images, and reported on others, on which something else may be better in both."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        some = rng.integers(IMAGES, size=12)
        few = Answers(
            {s: c[some] for s, c in found.confidence.items()},
            {s: r[some] for s, r in found.right.items()},
        )
        others = [o.cascade for o in frontier] + [(CascadeStage(s),) for s in SIZES]
        for outcome in frontier:
            chosen = thresholds.undominated(few, outcome.cascade, others, MS)
            assert chosen == thresholds.simulate(few, chosen.cascade, MS)
            for cascade in others:
                other = thresholds.simulate(few, cascade, MS)
                is_better = other.top1 > chosen.top1 and other.ms <= chosen.ms
                is_faster = other.top1 >= chosen.top1 and other.ms < chosen.ms
                assert not is_better
                assert not is_faster


def test_an_interval_is_that_of_the_binomial_distribution(found):
    """Top-1 of n images resampled is binomial; the time of a single size is the same for all images."""
    (low, high), (fast, slow) = thresholds.interval(found, (CascadeStage(48),), MS)
    rng = np.random.default_rng(1)
    drawn = rng.binomial(IMAGES, found.right[48].mean(), 100_000) / IMAGES * 100
    expected = np.percentile(drawn, [2.5, 97.5])
    assert [low, high] == pytest.approx(expected, abs=100 / IMAGES + 1e-9)  # one image
    assert (fast, slow) == pytest.approx((MS[48], MS[48]))
    (_, _), (fast, slow) = thresholds.interval(found, (CascadeStage(32, 0.5), CascadeStage(64)), MS)
    assert MS[32] < fast < slow < MS[32] + MS[64]


def test_a_longer_time_on_the_frontier_is_more_accurate(frontier):
    assert len(frontier) > 10
    for one, next_ in itertools.pairwise(frontier):
        assert one.ms < next_.ms
        assert one.top1 < next_.top1


def test_the_search_finds_what_trying_everything_finds(found, frontier):
    """All thresholds between two confidences, in each choice of sizes: at most 1 point is missed."""
    every = {s: [0.0, *np.sort(c)[::3], 1.0] for s, c in found.confidence.items()}
    tried = [thresholds.simulate(found, (CascadeStage(s),), MS) for s in SIZES]
    for small, large in itertools.combinations(SIZES, 2):
        tried += [
            thresholds.simulate(found, (CascadeStage(small, t), CascadeStage(large)), MS)
            for t in every[small]
        ]
    for low, middle in itertools.product(every[32], every[48]):
        cascade = (CascadeStage(32, low), CascadeStage(48, middle), CascadeStage(64))
        tried.append(thresholds.simulate(found, cascade, MS))
    for limit in np.linspace(1, 6, 40):
        best = max(outcome.top1 for outcome in tried if outcome.ms <= limit)
        assert max(o.top1 for o in frontier if o.ms <= limit + 1e-9) > best - 1.0


def test_a_size_that_costs_more_and_knows_less_is_left_out(found):
    useless = Answers(found.confidence, found.right | {48: np.zeros(IMAGES)})
    for outcome in thresholds.search(useless, MS | {48: 9.0}):
        assert 48 not in [step.size for step in outcome.cascade]


def test_of_many_sizes_the_pairs_are_tried_but_not_all_choices():
    choices = list(thresholds._choices(range(32)))
    assert len(choices) == 32 + 32 * 31 // 2
    assert len(list(thresholds._choices(range(5)))) == 2**5 - 1


def test_answers_are_the_softmax_of_logits_divided_by_the_temperature():
    logits = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    scores = LabelledLogits(torch.tensor([0, 0]), {64: logits, 32: -logits})
    found = thresholds.answers(scores, {64: 2.0, 32: 1.0})
    assert list(found.confidence) == [32, 64]
    np.testing.assert_allclose(found.confidence[64], 1 / (1 + np.exp([-1.0, -2.0])), rtol=1e-6)
    np.testing.assert_allclose(found.confidence[32], 1 / (1 + np.exp([-2.0, -4.0])), rtol=1e-6)
    assert found.right[64].tolist() == [1.0, 0.0]
    assert found.right[32].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("limit", "size"), [(0.9, None), (1.0, 32), (10.0, 64)])
def test_the_best_size_is_the_most_accurate_that_is_as_fast(limit, size):
    right = {s: np.array([0.0, s / 64]) for s in SIZES}
    assert thresholds.best_size(Answers({}, right), MS, limit) == size


FRONTIER = [
    Outcome((CascadeStage(s),), top1, ms)
    for s, top1, ms in ((32, 60, 2), (48, 70, 5), (64, 75, 10))
]


@pytest.mark.parametrize(
    ("target", "size"),
    [
        ({"target_top1": 60.0}, 32),
        ({"target_top1": 61.0}, 48),
        ({"target_ms": 9.9}, 48),
        ({"target_ms": 10.0}, 64),
    ],
)
def test_the_fastest_that_is_accurate_enough_or_the_best_that_is_fast_enough_is_taken(target, size):
    chosen = choose(FRONTIER, **{"target_top1": None, "target_ms": None} | target)
    assert chosen.cascade == (CascadeStage(size),)


@pytest.mark.parametrize(
    ("target", "ms"), [({"target_top1": 60.0}, 2.0), ({"target_ms": 2.5}, 2.0)]
)
def test_the_fastest_is_chosen_for_an_accuracy_and_the_most_accurate_for_a_time(target, ms):
    frontier = [Outcome((CascadeStage(64),), 50.0 + 10 * i, 1.0 + i) for i in range(4)]
    given = {"target_top1": None, "target_ms": None} | target
    assert choose(frontier, **given).ms == ms

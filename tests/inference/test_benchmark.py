"""A benchmark's figures against plain ones; and benchmarks/cascade.py, which compares on random halves."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cascade
from rsnet.inference import benchmark as bench_figures
from rsnet.inference import cascade_search as thresholds
from rsnet.inference import latency
from rsnet.inference.benchmark import Figures, peak_bytes
from rsnet.inference.calibration import LabelledLogits, collect_logits, find_labelled_images
from rsnet.inference.cascade import CascadeStage, Tuned, write_tuned
from rsnet.inference.classifier import SwitchableClassifier
from tests.helpers import releases
from tests.helpers.releases import SIZES

TUNED = Tuned({64: 0.5, 48: 2.0, 32: 4.0}, (CascadeStage(32, 0.2), CascadeStage(64)))
MS = {64: 40.0, 48: 20.0, 32: 8.0}


def _sample(_forward, _sizes, repeats):
    """101 times from half to one and a half of MS; a batch of one is faster."""
    factor = 1.0 if repeats == bench_figures.REPEATS["batch"] else 0.25
    return {s: [factor * ms * (0.5 + i / 100) for i in range(101)] for s, ms in MS.items()}


@pytest.fixture(autouse=True)
def _known_latencies(monkeypatch):
    monkeypatch.setattr(latency, "sample", _sample)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return releases.write_photos(tmp_path_factory.mktemp("labelled") / "val")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return releases.write(tmp_path_factory.mktemp("bench") / "release")


@pytest.fixture(scope="module")
def found(written, data) -> LabelledLogits:
    """Logits of all photos."""
    classifier = SwitchableClassifier.load(written)
    return collect_logits(classifier, find_labelled_images(data, classifier.config["network"]))


@pytest.fixture(scope="module")
def figures(written, found, tmp_path_factory) -> Figures:
    folder = shutil.copytree(written, tmp_path_factory.mktemp("tuned") / "release")
    classifier = SwitchableClassifier.load(folder, batch_size=4)
    write_tuned(folder, classifier.config["weights"]["sha256"], TUNED, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "sample", _sample)
        return bench_figures.measure(classifier, found)


def test_accuracies_are_those_of_the_classifiers_answers(written, data, figures):
    classifier = SwitchableClassifier.load(written)
    paths = sorted(data.rglob("*.jpg"))
    for size in figures.sizes:
        answers = classifier.classify(paths, size.size)
        for top in (1, 5):
            right = [p.parent.name in a.classes[:top] for p, a in zip(paths, answers, strict=True)]
            assert getattr(size, f"top{top}") == pytest.approx(100 * np.mean(right))


def test_churn_is_the_share_of_images_whose_answers_differ(written, data, figures):
    classifier = SwitchableClassifier.load(written)
    paths = sorted(data.rglob("*.jpg"))
    answers = {s: [p.classes[0] for p in classifier.classify(paths, s)] for s in SIZES}
    for a in SIZES:
        for b in SIZES:
            differ = [x != y for x, y in zip(answers[a], answers[b], strict=True)]
            assert figures.churn[a][b] == pytest.approx(100 * np.mean(differ))
    assert figures.churn[64][32] > 0


def test_times_are_percentiles_of_batches_and_their_images(figures):
    for size in figures.sizes:
        for times, unit in ((size.ms_batch, MS[size.size]), (size.ms_one, MS[size.size] / 4)):
            expected = {"p50": unit, "p95": 1.45 * unit, "p99": 1.49 * unit}
            assert times == pytest.approx(expected)
        assert size.images_per_s == pytest.approx(4 * 1000 / MS[size.size])


def test_a_larger_size_takes_more_memory(figures):
    peaks = [size.peak_mb for size in figures.sizes]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 4 * 64 * 64 * 3 * 4 / 1e6  # the images themselves


def test_no_memory_is_reported_of_a_cuda_graph_in_whose_replay_torch_allocates_nothing(
    written, found, monkeypatch
):
    classifier = SwitchableClassifier.load(written, batch_size=4)
    monkeypatch.setattr(classifier._forward, "_graphs", classifier._forward._eager)
    assert classifier.conditions["cuda_graphs"]
    sizes = bench_figures.measure(classifier, found).sizes
    assert [size.peak_mb for size in sizes] == [None] * len(SIZES)


def test_cascades_are_reported_on_the_half_that_is_not_fitted_to(found, figures):
    other = found.halves()[1]
    assert figures.held_out == len(other.labels) == 35
    for size in SIZES:
        (row,) = (c for c in figures.cascades if c.how == "size" and c.cascade[0].size == size)
        right = (other.logits[size].argmax(1) == other.labels).double().mean().item()
        assert (row.top1, row.ms) == (pytest.approx(100 * right), pytest.approx(MS[size] / 4))
    (row,) = (c for c in figures.cascades if c.how == "tuned")
    unsure = (other.logits[32] / 4.0).softmax(1).amax(1) < 0.2
    answers = torch.where(unsure, other.logits[64].argmax(1), other.logits[32].argmax(1))
    assert row.top1 == pytest.approx(100 * (answers == other.labels).double().mean().item())
    share = unsure.double().mean().item()
    assert row.ms == pytest.approx((MS[32] + share * MS[64]) / 4)
    assert row.shares == pytest.approx({32: 100 * (1 - share), 64: 100 * share})


def test_the_search_does_not_see_the_images_that_it_is_reported_on(found):
    fitted, other = found.halves()
    shuffled = dataclasses.replace(other, labels=other.labels.flip(0))
    cascades = [
        [c.cascade for c in bench_figures.cascades(fitted, half, MS, None) if c.how == "searched"]
        for half in (other, shuffled)
    ]
    assert cascades[0] == cascades[1]


def test_the_benchmark_compares_with_the_best_size_that_is_as_fast(found):
    rows = list(cascade.compare(found, MS, splits=2))
    assert [row.limit for row in rows] == [8.0, 14.0, 20.0, 30.0, 40.0] * 2
    for seed, some in enumerate((rows[:5], rows[5:])):
        right = [
            {s: (z.argmax(1) == half.labels).double().mean().item() for s, z in half.logits.items()}
            for half in found.halves(seed)
        ]
        for row in some:
            fitting = [s for s in reversed(SIZES) if MS[s] <= row.limit]
            assert right[0][row.size] == max(right[0][s] for s in fitting)
            assert row.size_top1 == pytest.approx(100 * right[1][row.size])
        assert some[0].mix_top1 == pytest.approx(100 * right[1][32])
    assert not torch.equal(found.halves(0)[0].labels, found.halves(1)[0].labels)


def test_a_mix_of_two_sizes_takes_just_the_time_there_is():
    right = {s: np.array([0.0, s / 64]) for s in SIZES}  # top-1 25, 37.5 and 50 %
    answers = thresholds.Answers({}, right)
    for limit, top1 in ((8.0, 25.0), (14.0, 31.25), (30.0, 43.75), (99.0, 50.0)):
        assert cascade.mix(answers, answers, MS, limit) == pytest.approx(top1)


def test_the_calibration_error_is_that_of_each_temperature(found, figures):
    for size in figures.sizes:
        assert size.ece == pytest.approx(_ece(found, size.size, 1.0), abs=1e-4)
        expected = _ece(found.halves()[1], size.size, TUNED.temperatures[size.size])
        assert size.tuned_ece == pytest.approx(expected, abs=1e-4)


def _ece(found: LabelledLogits, size: int, t: float) -> float:
    logits = found.logits[size].double().numpy() / t
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    best, right = probabilities.max(1), probabilities.argmax(1) == found.labels.numpy()
    bins = np.floor(best * 15)
    gaps = [abs((right[bins == b] - best[bins == b]).sum()) for b in np.unique(bins)]
    return 100 * sum(gaps) / len(best)


MEGABYTE = 2**20


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
            ],
        ),
    ],
)
def test_the_peak_is_what_lies_there_at_once_more_than_before(device):
    before = torch.empty(50 * MEGABYTE, dtype=torch.uint8, device=device)

    def computation() -> None:
        one = torch.empty(40 * MEGABYTE, dtype=torch.uint8, device=device)
        two = torch.empty(20 * MEGABYTE, dtype=torch.uint8, device=device)
        del one
        three = torch.empty(30 * MEGABYTE, dtype=torch.uint8, device=device)
        del two, three

    # A GPU's allocator may give a tensor up to 1 MB more, rather than leave that over.
    rounded = 2 * MEGABYTE if device == "cuda" else 0
    assert peak_bytes(computation, before.device) == pytest.approx(60 * MEGABYTE, abs=rounded)

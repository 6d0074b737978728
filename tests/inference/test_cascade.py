"""Cascades image by image, and what `tune` leaves for them in tuned.json."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.utils.errors import DataError, UsageError
from rsnet.inference import cascade
from rsnet.inference.cascade import CascadeStage, Tuned, read_tuned, write_tuned
from rsnet.inference.classifier import Prediction, SwitchableClassifier
from tests.helpers import releases
from tests.helpers.releases import SIZES

TUNED = Tuned({64: 0.5, 48: 2.0, 32: 4.0}, (CascadeStage(32, 0.2), CascadeStage(64)))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return releases.write(tmp_path_factory.mktemp("tune") / "release")


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "release")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return releases.write_photos(tmp_path_factory.mktemp("labelled") / "val")


@pytest.fixture
def photos(data) -> list[Path]:
    return sorted(data.rglob("*.jpg"))[:20]


@pytest.fixture(scope="module")
def loaded(written) -> SwitchableClassifier:
    return SwitchableClassifier.load(written, batch_size=4)


@pytest.fixture
def classifier(loaded):
    """Without the hooks of other tests."""
    yield loaded
    loaded.model._forward_hooks.clear()
    loaded.model._forward_pre_hooks.clear()


def _photo(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _seen(classifier: SwitchableClassifier) -> list[torch.Tensor]:
    """What the network gets from now on, batch by batch."""
    batches: list[torch.Tensor] = []
    classifier.model.register_forward_pre_hook(lambda _, args: batches.append(args[0]))
    return batches


def _cascade_by_hand(folder: Path, photos: list[Image.Image], confidence: float) -> list[tuple]:
    """Every image alone through one size after the other: size and best class."""
    classifier = SwitchableClassifier.load(folder)
    decided = []
    for photo in photos:
        for size in (32, 48, 64):
            (one,) = classifier.classify(photo, size)
            if one.probabilities[0] >= confidence:
                break
        decided.append((one.size, one.classes[0]))
    return decided


def _threshold(classifier: SwitchableClassifier, photos: list[Image.Image]) -> float:
    """A confidence that some images reach at each size, between any two of their probabilities."""
    found = {s: [p.probabilities[0] for p in classifier.classify(photos, s)] for s in SIZES}
    candidates = sorted(p for values in found.values() for p in values)
    for low, high in itertools.pairwise(candidates):
        middle = (low + high) / 2
        unsure = [i for i, p in enumerate(found[32]) if p < middle]
        later = [i for i in unsure if found[48][i] < middle]
        if high - low > 1e-5 and 4 < len(later) < len(unsure) - 1 < len(photos) - 2:
            return middle
    raise AssertionError("no such threshold")


@pytest.fixture(scope="module")
def photos_and_threshold(loaded) -> tuple[list[Image.Image], float]:
    photos = [_photo(seed) for seed in range(19)]
    return photos, _threshold(loaded, photos)


def test_only_the_unsure_go_on_to_the_next_larger_size(classifier, folder, photos_and_threshold):
    photos, threshold = photos_and_threshold
    found = classifier.classify(photos, confidence=threshold)
    assert [(p.size, p.classes[0]) for p in found] == _cascade_by_hand(folder, photos, threshold)
    assert {p.size for p in found} == set(SIZES)


def test_the_unsure_are_regrouped_into_full_batches(classifier, photos_and_threshold):
    photos, threshold = photos_and_threshold
    seen = _seen(classifier)
    sizes = [p.size for p in classifier.classify(photos, confidence=threshold)]
    computed = {size: [len(b) for b in seen if b.shape[-1] == size] for size in SIZES}
    images = {32: 19, 48: 19 - sizes.count(32), 64: sizes.count(64)}
    for size, count in images.items():
        assert sum(computed[size]) == count
        assert computed[size][:-1] == [4] * ((count - 1) // 4)


def test_an_image_as_sure_as_the_threshold_goes_no_further():
    sure, unsure = 0.5, 0.25

    def predict(pixels, size):
        return [Prediction(("ant",), (sure if p.max() else unsure,), size, 1.0) for p in pixels]

    images = enumerate(Image.new("RGB", (64, 64), (v, v, v)) for v in (255, 0))
    found = dict(
        cascade.run_cascade(images, (CascadeStage(32, sure), CascadeStage(64)), predict, 2)
    )
    assert [found[i].size for i in range(2)] == [32, 64]


def test_the_cascade_computes_a_larger_size_before_it_has_read_all_images(classifier):
    seen = _seen(classifier)
    answers = classifier.stream(((i, _photo(i)) for i in range(10)), confidence=1.0)
    next(answers)
    assert [(len(b), b.shape[-1]) for b in seen] == [(4, 32), (4, 48), (4, 64)]
    assert [key for key, _ in answers] == list(range(1, 10))


@pytest.mark.parametrize(("confidence", "size"), [(1e-9, 32), (1.0, 64)])
def test_the_bounds_of_the_confidence_decide_at_the_smallest_and_the_largest(
    classifier, confidence, size
):
    seen = _seen(classifier)
    assert classifier.classify(_photo(0), confidence=confidence)[0].size == size
    assert len(seen) == (1 if size == 32 else 3)


def test_a_cascades_milliseconds_are_those_of_all_sizes_passed(classifier, monkeypatch):
    ticks = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr("rsnet.inference.classifier.time.perf_counter", lambda: next(ticks))
    one, two = classifier.classify([_photo(0), _photo(1)], confidence=1.0)
    assert one.ms == two.ms == 3500.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 0.0}, "confidence 0.0: must be above 0, and 1 at most"),
        ({"confidence": 80.0}, "confidence 80.0: must be above 0"),
        ({"confidence": float("nan")}, "confidence nan: must be above 0"),
        ({"budget_ms": 0.0}, "budget_ms 0.0: must be above 0"),
        ({"budget_ms": float("nan")}, "budget_ms nan: must be above 0"),
        ({"confidence": 0.5, "size": 64}, "give one of size, confidence and budget_ms"),
    ],
)
def test_a_confidence_or_budget_that_is_none_is_refused(classifier, options, message):
    with pytest.raises(UsageError, match=message):
        classifier.classify(_photo(0), **options)


def _softmax(classifier: SwitchableClassifier, photo: Path, size: int, t: float) -> list[float]:
    """All probabilities, the largest first."""
    pixels = releases.pixels(photo, size)
    logits = classifier.logits(pixels[None], size)[0].double().numpy() / t
    return sorted(np.exp(logits) / np.exp(logits).sum(), reverse=True)


@pytest.mark.parametrize("size", SIZES)
def test_probabilities_are_calibrated_when_asked_for_and_not_otherwise(folder, data, size):
    photo = min(data.rglob("*.jpg"))
    classifier = SwitchableClassifier.load(folder)
    before = classifier.classify(photo, size)[0]
    write_tuned(folder, classifier.config["weights"]["sha256"], TUNED, {})
    assert classifier.classify(photo, size)[0].probabilities == before.probabilities
    found = classifier.classify(photo, size, tuned=True)[0]
    expected = _softmax(classifier, photo, size, TUNED.temperatures[size])[:5]
    assert found.probabilities == pytest.approx(expected, abs=1e-5)
    assert found.classes == before.classes


def test_each_size_of_the_tuned_cascade_has_its_threshold(folder, photos):
    classifier = SwitchableClassifier.load(folder, batch_size=4)
    best = {
        s: [_softmax(classifier, p, s, t)[0] for p in photos] for s, t in TUNED.temperatures.items()
    }
    low, high = np.median(best[32]), np.median(best[48])
    cascade = (CascadeStage(32, float(low)), CascadeStage(48, float(high)), CascadeStage(64))
    write_tuned(
        folder, classifier.config["weights"]["sha256"], Tuned(TUNED.temperatures, cascade), {}
    )
    sizes = [p.size for p in classifier.classify(photos, tuned=True)]
    expected = [
        32 if a >= low else 48 if b >= high else 64 for a, b in zip(best[32], best[48], strict=True)
    ]
    assert sizes == expected
    assert set(sizes) == set(SIZES)


def test_a_confidence_is_compared_with_calibrated_probabilities_if_they_are_asked_for(
    folder, photos
):
    classifier = SwitchableClassifier.load(folder)
    flat = Tuned(dict.fromkeys(SIZES, 1000.0), TUNED.cascade)  # all probabilities near 1/8
    write_tuned(folder, classifier.config["weights"]["sha256"], flat, {})
    assert classifier.classify(photos[0], confidence=0.126)[0].size == 32
    assert classifier.classify(photos[0], confidence=0.126, tuned=True)[0].size == 64


def test_a_release_that_is_not_tuned_says_what_tunes_it(folder):
    message = rf"there is no {re.escape(str(folder))}/tuned\.json; `python -m rsnet tune` writes it"
    with pytest.raises(UsageError, match=message):
        SwitchableClassifier.load(folder).classify(np.zeros((9, 9, 3), np.uint8), tuned=True)


DAMAGES = {
    "text": lambda _: "no JSON",
    "list": lambda _: "[]",
    "nested": lambda _: "[" * 100_000,
    "format": lambda c: json.dumps(c | {"format": 2}),
    "temperature": lambda c: json.dumps(c | {"temperatures": {"64": 1, "48": 1}}),
    "negative": lambda c: json.dumps(c | {"temperatures": {"64": 1, "48": 1, "32": -1}}),
    "nan": lambda c: json.dumps(c | {"temperatures": {"64": 1, "48": 1, "32": float("nan")}}),
    "infinite": lambda c: json.dumps(c | {"cascade": [{"size": float("inf"), "threshold": 0}]}),
    "number": lambda c: json.dumps(c | {"cascade": [{"size": 32, "threshold": 10**400}]}),
    "tiny": lambda c: json.dumps(c | {"temperatures": {"64": 1, "48": 1, "32": 1e-40}}),
    "deep": lambda _: "[" * 100_000,
    "empty": lambda c: json.dumps(c | {"cascade": []}),
    "half": lambda c: json.dumps(c | {"cascade": [{"size": 32.5, "threshold": 0}]}),
    "size": lambda c: json.dumps(c | {"cascade": [{"size": 40, "threshold": 0}]}),
    "order": lambda c: json.dumps(c | {"cascade": c["cascade"][::-1]}),
    "threshold": lambda c: json.dumps(c | {"cascade": [{"size": 32, "threshold": 1.5}]}),
    "other": lambda c: json.dumps(c | {"sha256": "0" * 64}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line(tmp_path, damage):
    write_tuned(tmp_path, "1" * 64, TUNED, {})
    assert read_tuned(tmp_path, "1" * 64, SIZES) == TUNED
    path = tmp_path / "tuned.json"
    path.write_text(DAMAGES[damage](json.loads(path.read_text())))
    what = "is of other weights" if damage == "other" else "is damaged"
    with pytest.raises(
        DataError, match=rf"tuned\.json {what}.*; run `python -m rsnet tune` again$"
    ):
        read_tuned(tmp_path, "1" * 64, SIZES)

"""`python -m rsnet tune`: what it writes holds for the classifier, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import reference
from pipelines.batch import LoaderSpec
from pipelines.utils.errors import DataError, UsageError
from rsnet.__main__ import main
from rsnet.cli import tune
from rsnet.inference import latency, scores, tuned
from rsnet.inference.cascade import CascadeStage
from rsnet.inference.cascade_search import Outcome
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.inference.tuned import Tuned
from rsnet.release import package as release
from tests.helpers import releases
from tests.helpers.releases import CLASSES, SIZES

TABLE = {s: {"median": ms, "p95": ms} for s, ms in ((64, 40.0), (48, 20.0), (32, 8.0))}
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


@pytest.fixture(autouse=True)
def _known_latencies(monkeypatch):
    monkeypatch.setattr(latency, "measure", lambda _forward, _sizes: TABLE)


def _tune(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["tune", *map(str, words), "--batch-size", "4"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("target", [("--target-ms", 6), ("--target-top1", 5)])
def test_what_is_reported_is_what_the_classifier_does(folder, data, capsys, target):
    code, out, err = _tune(capsys, folder, "--data", data, *target)
    assert (code, err) == (0, "")
    content = json.loads((folder / "tuned.json").read_text())
    classifier = SwitchableClassifier.load(folder, batch_size=4)
    paths = sorted(data.rglob("*.jpg"))
    found = classifier.classify(paths, tuned=True)
    climbed = [step["size"] for step in content["cascade"]]
    taken = [sum(TABLE[s]["median"] / 4 for s in climbed if s <= p.size) for p in found]
    right = [path.parent.name == p.classes[0] for path, p in zip(paths, found, strict=True)]
    halves = [content["fitted"], content["held_out"]]
    is_missed = target[0] == "--target-top1" and content["held_out"]["top1"] < target[1]
    assert ("note: that is below" in out) == is_missed
    assert [half["images"] for half in halves] == [35, 35]
    assert np.mean([half["top1"] for half in halves]) == pytest.approx(100 * np.mean(right))
    assert np.mean([half["ms"] for half in halves]) == pytest.approx(np.mean(taken))
    assert f"{content['held_out']['top1']:.2f}" in out
    limit = content["target"]
    assert limit["ms"] is None or content["fitted"]["ms"] <= limit["ms"]
    assert limit["top1"] is None or content["fitted"]["top1"] >= limit["top1"]


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
    chosen = tune._choose(FRONTIER, tune.Options(Path(), Path(), **target))
    assert chosen.ladder == (CascadeStage(size),)


def test_the_report_is_of_images_that_were_not_fitted_to(folder, data):
    classifier = SwitchableClassifier.load(folder)
    found = scores.collect(classifier, scores.find(data, classifier.config["network"]))
    one, other = found.halves()
    keys = [{tuple(row.tolist()) for row in half.logits[64]} for half in (one, other)]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 70
    again = found.halves()[0]
    assert torch.equal(one.labels, again.labels)


def test_the_logits_are_those_of_an_evaluation(folder, data):
    classifier = SwitchableClassifier.load(folder, batch_size=16)
    found = scores.collect(classifier, scores.find(data.parent, classifier.config["network"]))
    spec = LoaderSpec(data.parent, SIZES, 70, torch.device("cpu"))
    (batch,) = reference.make_loaders(reference.ReferenceOptions(), spec, False).val
    assert torch.equal(found.labels, batch.labels)
    network = release.load(folder)
    for images, size in zip(batch.images, SIZES, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(
                found.logits[size], network(images, size), rtol=1e-4, atol=1e-4
            )


def test_labels_follow_the_releases_classes_by_name(data):
    network = {"classes": CLASSES[::-1], "num_classes": 8}
    folder = scores.find(data, network)
    names = [network["classes"][label] for label in folder.labels]
    assert names == [Path(path).parent.name for path in folder.paths]


def test_without_names_the_folders_are_the_classes_in_their_order(data):
    folder = scores.find(data, {"classes": [], "num_classes": 7})
    assert [CLASSES[label] for label in folder.labels] == [
        Path(p).parent.name for p in folder.paths
    ]
    with pytest.raises(UsageError, match=r"has a class 'ant'.* \(7 classes there, 0 here\)"):
        scores.find(data, {"classes": [], "num_classes": 8})


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
    tuned.write(folder, classifier.config["weights"]["sha256"], TUNED, {})
    assert classifier.classify(photo, size)[0].probabilities == before.probabilities
    found = classifier.classify(photo, size, tuned=True)[0]
    expected = _softmax(classifier, photo, size, TUNED.temperatures[size])[:5]
    assert found.probabilities == pytest.approx(expected, abs=1e-5)
    assert found.classes == before.classes


@pytest.fixture
def photos(data) -> list[Path]:
    return sorted(data.rglob("*.jpg"))[:20]


def test_each_size_of_the_tuned_cascade_has_its_threshold(folder, photos):
    classifier = SwitchableClassifier.load(folder, batch_size=4)
    best = {
        s: [_softmax(classifier, p, s, t)[0] for p in photos] for s, t in TUNED.temperatures.items()
    }
    low, high = np.median(best[32]), np.median(best[48])
    ladder = (CascadeStage(32, float(low)), CascadeStage(48, float(high)), CascadeStage(64))
    tuned.write(
        folder, classifier.config["weights"]["sha256"], Tuned(TUNED.temperatures, ladder), {}
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
    flat = Tuned(dict.fromkeys(SIZES, 1000.0), TUNED.ladder)  # all probabilities near 1/8
    tuned.write(folder, classifier.config["weights"]["sha256"], flat, {})
    assert classifier.classify(photos[0], confidence=0.126)[0].size == 32
    assert classifier.classify(photos[0], confidence=0.126, tuned=True)[0].size == 64


def test_predict_takes_what_was_tuned(folder, photos, capsys):
    classifier = SwitchableClassifier.load(folder)
    tuned.write(folder, classifier.config["weights"]["sha256"], TUNED, {})
    words = ["predict", folder, *photos, "--json", "--device", "cpu"]
    assert main([*map(str, words), "--tuned"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = {
        str(p): c for p, c in zip(photos, classifier.classify(photos, tuned=True), strict=True)
    }
    assert len(lines) == len(photos)
    for line in lines:
        assert line["size"] == expected[line["image"]].size
        assert line["top"][0]["probability"] == expected[line["image"]].probabilities[0]


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
    tuned.write(tmp_path, "1" * 64, TUNED, {})
    assert tuned.read(tmp_path, "1" * 64, SIZES) == TUNED
    path = tmp_path / "tuned.json"
    path.write_text(DAMAGES[damage](json.loads(path.read_text())))
    what = "is of other weights" if damage == "other" else "is damaged"
    with pytest.raises(
        DataError, match=rf"tuned\.json {what}.*; run `python -m rsnet tune` again$"
    ):
        tuned.read(tmp_path, "1" * 64, SIZES)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--target-top1", "99"], 1, r"no cascade has a top-1 of 99 %: the best has \d+\.\d\d %, at "),
        (["--target-ms", "1.5"], 1, r"no cascade takes 1.5 ms an image: the fastest takes 2,"),
        ([], 2, "--target-top1, --target-ms: give one of the two"),
        (["--target-top1", "60", "--target-ms", "3"], 2, "--target-top1, --target-ms: give one of the two"),
        (["--target-top1", "101"], 2, "--target-top1 101.0: must be a percentage"),
        (["--target-ms", "nan"], 2, "--target-ms nan: must be above 0"),
    ],
)  # fmt: skip
def test_a_target_that_cannot_be_met_is_one_line(folder, data, capsys, words, code, message):
    found, out, err = _tune(capsys, folder, "--data", data, *words)
    assert (found, out) == (code, "")
    assert re.match(f"rsnet tune: error: {message}", err)
    assert err.count("\n") == 1
    assert not (folder / "tuned.json").exists()


@pytest.mark.parametrize(
    ("target", "ms"), [({"target_top1": 60.0}, 2.0), ({"target_ms": 2.5}, 2.0)]
)
def test_the_fastest_is_chosen_for_an_accuracy_and_the_most_accurate_for_a_time(target, ms):
    frontier = [Outcome((CascadeStage(64),), 50.0 + 10 * i, 1.0 + i) for i in range(4)]
    options = tune.Options(Path("release"), Path("val"), **target)
    assert tune._choose(frontier, options).ms == ms


def test_images_of_other_classes_are_one_line(folder, data, tmp_path, capsys):
    other = shutil.copytree(data, tmp_path / "other")
    (other / "ant").rename(other / "yak")
    code, _, err = _tune(capsys, folder, "--data", other, "--target-ms", 9)
    assert code == 2
    assert "other has a class 'yak', other than the release (7 classes there, 7 here)" in err
    shutil.rmtree(other / "yak")
    code, _, err = _tune(capsys, folder, "--data", other, "--target-ms", 9)
    assert code == 2
    assert "other lacks the class 'ant', other than the release (6 classes there, 7 here)" in err


def test_what_has_no_labelled_images_is_one_line(folder, tmp_path, capsys):
    code, _, err = _tune(capsys, folder, "--data", tmp_path / "none", "--target-ms", 9)
    assert (code, err) == (2, f"rsnet tune: error: --data: there is no folder {tmp_path}/none\n")


def test_one_image_is_too_few():
    with pytest.raises(UsageError, match="--data: at least 2 images are needed"):
        scores.LabelledLogits(torch.zeros(1), {64: torch.zeros(1, 2)}).halves()


def test_outputs_that_are_not_finite_name_the_image(folder, data, monkeypatch):
    classifier = SwitchableClassifier.load(folder)
    monkeypatch.setattr(
        classifier, "logits", lambda pixels, _: torch.full((len(pixels), 8), torch.nan)
    )
    labelled = scores.find(data, classifier.config["network"])
    with pytest.raises(DataError, match=r"0\.jpg: the network's outputs at size 64 are not finite"):
        scores.collect(classifier, labelled)


def test_a_broken_image_ends_it_with_its_path(folder, data, tmp_path, capsys):
    other = shutil.copytree(data, tmp_path / "other")
    (other / "ant" / "0.jpg").write_bytes(b"no picture")
    code, _, err = _tune(capsys, folder, "--data", other, "--target-ms", 9)
    assert code == 1
    assert f"{other}/ant/0.jpg: cannot identify image file" in err

"""`rsnet tune`: what it writes holds for the classifier, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from rsnet.__main__ import main
from rsnet.inference import latency
from rsnet.inference.cascade import CascadeStage, Tuned, write_tuned
from rsnet.inference.classifier import SwitchableClassifier
from tests.helpers import releases

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
    measuring = "measuring batches of 4 at sizes 64 48 32 on cpu\n"
    taken = r"^release .+: parallel_resnet10, sizes 64 48 32\n"
    return code, re.sub(taken, "", captured.out), captured.err.removeprefix(measuring)


@pytest.mark.parametrize("target", [("--target-ms", 6), ("--target-top1", 5)])
def test_what_is_reported_is_what_the_classifier_does(folder, data, capsys, target):
    code, out, err = _tune(capsys, folder, "--data", data, *target)
    assert (code, err) == (0, "")
    content = json.loads((folder / "tuned.json").read_text())
    classifier = SwitchableClassifier.load(folder, batch_size=4)
    paths = sorted(data.rglob("*.jpg"))
    found = classifier.classify(paths, tuned=True)
    taken_sizes = [step["size"] for step in content["cascade"]]
    taken = [sum(TABLE[s]["median"] / 4 for s in taken_sizes if s <= p.size) for p in found]
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


@pytest.fixture
def photos(data) -> list[Path]:
    return sorted(data.rglob("*.jpg"))[:20]


def test_predict_takes_what_was_tuned(folder, photos, capsys):
    classifier = SwitchableClassifier.load(folder)
    write_tuned(folder, classifier.config["weights"]["sha256"], TUNED, {})
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


def test_a_broken_image_ends_it_with_its_path(folder, data, tmp_path, capsys):
    other = shutil.copytree(data, tmp_path / "other")
    (other / "ant" / "0.jpg").write_bytes(b"no image")
    code, _, err = _tune(capsys, folder, "--data", other, "--target-ms", 9)
    assert code == 1
    assert f"{other}/ant/0.jpg: cannot identify image file" in err

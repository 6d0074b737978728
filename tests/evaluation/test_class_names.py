"""Readable names of classes: of files in all their forms, and of WordNet ids."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest
from torchvision.models import ResNet50_Weights

from pipelines.utils.errors import DataError, UsageError
from rsnet.evaluation import class_names
from rsnet.evaluation.class_names import imagenet_ids, readable_names

IDS = ("n01440764", "n01443537", "n02084071")
NAMES = ("tench", "gold fish", "dog, domestic dog")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "tench\ngold fish\r\n  dog, domestic dog \n\n"),
        ("names.txt", "\ufefftench\ngold fish\ndog, domestic dog"),  # of an editor of Windows'
        ("names.json", "\ufeff" + json.dumps(NAMES)),
        ("names.json", json.dumps(NAMES)),
        ("names.json", json.dumps(dict(zip(IDS, NAMES, strict=True)) | {"n09999999": "more"})),
        ("names.json", json.dumps({"0": "tench", "2": NAMES[2], "1": NAMES[1]})),
        ("index.JSON", json.dumps({str(i): p for i, p in enumerate(zip(IDS, NAMES, strict=True))})),
        ("synsets.txt", f"{IDS[2]} {NAMES[2]}\n{IDS[0]}\t{NAMES[0]}\n{IDS[1]} {NAMES[1]}\n"),
    ],
)
def test_a_file_names_the_classes_in_order_or_by_class_or_by_output(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    assert readable_names(IDS, 3, file) == NAMES
    assert readable_names(IDS, 5, file) == (*NAMES, "3", "4")


def test_a_file_names_all_outputs_of_a_network_that_names_none(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("a\nb\nc\nd\n")
    assert readable_names((), 4, file) == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("x.txt", b"one\ntwo\n", UsageError, "x.txt has 2 names, and the network 3 classes"),
        ("x.txt", b"", UsageError, "0 names"),
        ("x.txt", b"one\n\nthree\n", DataError, r"x.txt is damaged .*line 2 is empty"),
        ("x.txt", b"\xff\xfe", DataError, "x.txt is damaged"),
        ("x.json", b"{", DataError, "x.json is damaged"),
        ("x.json", b"7", DataError, "x.json is damaged"),
        ("x.json", b'["a", 7, "c"]', DataError, "7 is no name"),
        ("x.json", b'{"n01440764": "tench"}', UsageError, "does not name the class n01443537"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, name, content, error, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        readable_names(IDS, 3, file)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_huge_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="there is no file"):
        readable_names(IDS, 3, tmp_path / "none.txt")
    (tmp_path / "x.txt").write_text("one\n")
    monkeypatch.setattr(class_names, "_MOST_BYTES", 3)
    with pytest.raises(DataError, match="it is to name classes"):
        readable_names(IDS, 3, tmp_path / "x.txt")


def test_imagenets_ids_have_torchvisions_names_without_timm(monkeypatch):
    """The hash in the code is that of the ids that timm knows."""
    pytest.importorskip("timm")
    ids = imagenet_ids()
    names = tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    monkeypatch.setitem(sys.modules, "timm.data.imagenet_info", None)
    assert imagenet_ids() is None
    assert readable_names(ids, 1000, None) == names
    assert (names[0], names[134], names[999]) == ("tench", "crane bird", "toilet tissue")
    assert ids[134] == "n02012849"


def test_some_of_imagenets_ids_have_names_if_timm_is_installed(monkeypatch):
    pytest.importorskip("timm")
    some = (imagenet_ids()[7], "n00000001", imagenet_ids()[0])
    assert readable_names(some, 4, None) == ("cock", "n00000001", "tench", "3")
    monkeypatch.setitem(sys.modules, "timm.data.imagenet_info", None)
    assert readable_names(some, 4, None) == (*some, "3")


def test_names_that_are_no_ids_stay_what_they_are():
    assert readable_names(("n01440764", "cat"), 2, None) == ("n01440764", "cat")
    assert readable_names((), 2, None) == ("0", "1")


def test_the_hash_is_of_the_ids_in_their_order():
    pytest.importorskip("timm")
    text = "\n".join(sorted(imagenet_ids()))
    assert hashlib.sha256(text.encode()).hexdigest() == class_names._IMAGENET_SHA256

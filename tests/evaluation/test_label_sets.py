"""Which outputs the labels of other data are, and ImageNet-ReaL's labels."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from pipelines.utils.errors import DataError, UsageError
from rsnet.evaluation.class_names import imagenet_ids
from rsnet.evaluation.label_sets import any_labels, match_classes, read_real, real_labels

ANIMALS = ("ant", "bee", "cat", "dog")


def test_the_same_classes_are_compared_with_all_outputs_as_training_does():
    found = match_classes(ANIMALS, ANIMALS, 6)  # two outputs have no name
    assert found.outputs.tolist() == found.positions.tolist() == [0, 1, 2, 3]
    assert (found.among, found.classes, found.how) == (None, ANIMALS, "")


def test_of_some_classes_an_answer_is_chosen_among_these():
    found = match_classes(["dog", "bee"], ANIMALS, 4)
    assert found.outputs.tolist() == [3, 1]
    assert found.among.tolist() == [1, 3]
    assert found.positions.tolist() == [1, 0]
    assert found.how == "the data has 2 of 4 classes: answers are chosen among these"


def test_numbered_folders_are_outputs_in_the_order_of_numbers_not_of_names():
    folders = sorted(map(str, range(12)))  # 0 1 10 11 2 ...
    found = match_classes(folders, [f"class{i:02}" for i in range(12)], 12)
    assert found.outputs.tolist() == [int(name) for name in folders]
    assert found.among is None
    assert "numbers" in found.how
    some = match_classes(["007", "11"], (), 12)
    assert (some.outputs.tolist(), some.among.tolist()) == ([7, 11], [7, 11])


def test_numbers_that_a_network_was_trained_on_are_names():
    folders = sorted(map(str, range(12)))
    assert match_classes(folders, folders, 12).outputs.tolist() == list(range(12))


def test_classes_of_a_network_without_names_are_the_folders_or_imagenets():
    found = match_classes(ANIMALS, (), 4)
    assert (found.outputs.tolist(), found.classes) == ([0, 1, 2, 3], ANIMALS)
    pytest.importorskip("timm")
    ids = imagenet_ids()
    some = match_classes([ids[7], ids[300]], (), 1000)
    assert some.outputs.tolist() == [7, 300]
    assert some.classes[999] == ids[999]


@pytest.mark.parametrize(
    ("data", "network", "classes", "message"),
    [
        (["ant", "eel"], ANIMALS, 4, "none of the network's 4: eel"),
        (["0", "4"], ANIMALS, 4, "a class folder 4, and the network the outputs 0 to 3"),
        (["1", "01"], ANIMALS, 4, "two class folders of the same number"),
        (["ant", "bee"], (), 4, "has 2 classes, and the network 4 that it does not name"),
        (["n00000001"], (), 1000, "has 1 classes, and the network 1000"),
    ],
)
def test_classes_that_are_not_the_networks_are_refused(data, network, classes, message):
    with pytest.raises(UsageError, match=message):
        match_classes(data, network, classes)


def test_without_timm_a_part_of_imagenet_needs_the_networks_own_names(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data.imagenet_info", None)
    with pytest.raises(UsageError, match=r'pip install "rsnet-trainer\[timm\]"'):
        match_classes(["n01440764"], (), 1000)


def test_labels_that_are_not_used_may_be_of_any_classes():
    assert any_labels(["x", "y"], ANIMALS, 4).classes == ANIMALS
    assert any_labels(ANIMALS, (), 4).classes == ANIMALS
    assert any_labels(["x", "y"], (), 4).classes == ()
    assert (
        any_labels(["0", "1", "10", "2"], (), 4).classes == ()
    )  # outputs, not names in their order


def _paths(*numbers: int) -> list[str]:
    return [f"val/x/ILSVRC2012_val_{n:08}.JPEG" for n in numbers]


def test_real_labels_are_found_by_the_images_names(tmp_path):
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[5], [], [1, 7, 2]]))
    labels = real_labels(_paths(3, 1, 2), read_real(file), (), 1000)
    assert labels.tolist() == [[1, 7, 2], [5, -1, -1], [-1, -1, -1]]
    shard = ["val-00000.tar: ILSVRC2012_val_00000003", "a.tar: n01/ILSVRC2012_val_00000001"]
    assert real_labels(shard, read_real(file), (), 1000).tolist() == [[1, 7, 2], [5, -1, -1]]


def test_real_labels_of_a_network_that_was_trained_on_numbered_folders_follow_the_numbers():
    folders = sorted(map(str, range(12)))
    labels = real_labels(_paths(1), [[10, 2]], folders, 12)
    assert [folders[i] for i in labels[0]] == ["10", "2"]
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("path", "labels", "message"),
    [
        ("val/x/photo.jpg", [[0]], "none of val/x/photo.jpg"),
        (*_paths(2), [[0]], "ILSVRC2012_val_00000001.JPEG to 00000001, and none of"),
        (*_paths(0), [[0]], "and none of"),
        (*_paths(1), [[]], "none of the images has a label"),
        (*_paths(1), [[3]], "labels go up to 3, and the network has the outputs 0 to 2"),
    ],
)
def test_images_and_networks_that_real_has_no_labels_of_are_refused(path, labels, message):
    with pytest.raises(UsageError, match=message):
        real_labels([path], labels, (), 3)


@pytest.mark.parametrize(
    "text", ["{}", "[1]", "[[-1]]", "[[1000]]", '[["a"]]', "[[true]]", "[", "[["]
)
def test_a_file_that_is_not_reals_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "real.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"real\.json is damaged .*reassessed-imagenet") as caught:
        read_real(file)
    assert "\n" not in str(caught.value)


def test_real_labels_are_of_imagenets_classes_wherever_a_network_has_them():
    ids = list(imagenet_ids())
    assert real_labels(_paths(1), [[65, 3]], ids, 1000).tolist() == [[65, 3]]
    more = sorted([*ids, "n00000001", "n99999999"])  # as of ImageNet-21k
    labels = real_labels(_paths(1), [[65, 3]], more, 1002)
    assert [more[i] for i in labels[0]] == [ids[65], ids[3]]


@pytest.mark.parametrize("classes", [[f"c{i:03}" for i in range(1000)], ["n01440764", "n01443537"]])
def test_real_labels_of_other_classes_are_refused(classes):
    with pytest.raises(UsageError, match=r"^--real: the network's classes are not ImageNet's"):
        real_labels(_paths(1), [[1]], classes, len(classes))

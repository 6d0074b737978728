"""What is said of classes that one of the splits has no images of, whatever the data is."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from pipelines import dali, ffcv
from pipelines.__main__ import main
from pipelines.batch import LoaderSpec
from pipelines.sources.options import SplitOptions
from pipelines.sources.splits import announce, open_splits
from pipelines.utils.errors import DataError, UsageError
from tests.conftest import needs_ffcv, write_photo
from tests.pipelines.sources.conftest import write_table

ROWS = [
    ("train", "ant"), ("train", "ant"), ("train", "bee"), ("train", "bee"),
    ("val", "ant"), ("val", "cat"), ("test", "dog"),
]  # fmt: skip
TRAIN = "has no images of 2 of 4 classes (cat, dog): the network cannot learn them\n"
VAL = "has no images of 2 of 4 classes (bee, dog): its accuracies do not cover them\n"


@pytest.fixture
def table(tmp_path) -> Path:
    """Training images of ant and bee, validation images of ant and cat, and one of dog for a test."""
    rows = []
    for i, (split, label) in enumerate(ROWS):
        write_photo(tmp_path / f"{i}.jpg", 40, 40, seed=i)
        rows.append({"path": f"{i}.jpg", "label": label, "split": split})
    return write_table(tmp_path / "labels.csv", rows)


def spec_of(data: Path | str) -> LoaderSpec:
    return LoaderSpec(data, (32,), 2, torch.device("cpu"))


def as_shards(table: Path) -> Path:
    assert main(["shards", "--data", str(table), "--output", str(table.parent / "shards")]) == 0
    return table.parent / "shards"


@pytest.mark.parametrize("kind", ["table", "shards"])
def test_a_training_and_an_evaluation_name_the_classes_that_a_split_lacks(table, capsys, kind):
    data = table if kind == "table" else as_shards(table)
    assert kind == "table" or capsys.readouterr().err.endswith(f"{table} (val) {VAL}")
    dali.make_loaders(dali.DaliOptions(), spec_of(data))
    assert capsys.readouterr().err == f"warning: {data} (train) {TRAIN}note: {data} (val) {VAL}"
    dali.make_loaders(dali.DaliOptions(), spec_of(data), with_train=False)
    assert capsys.readouterr().err == f"note: {data} (val) {VAL}"


def test_a_class_without_images_is_none_whose_images_are_bad(table, capsys):
    assert main(["verify", str(table)]) == 0
    assert capsys.readouterr().err == f"warning: {table} (train) {TRAIN}note: {table} (val) {VAL}"
    loaders = dali.make_loaders(dali.DaliOptions(skip_bad=True), spec_of(table))
    assert len(loaders.val.sample_names) == 2
    (table.parent / "5.jpg").write_bytes(b"no image")
    assert main(["verify", str(table)]) == 1
    assert f"all images of {table} (val)/cat are bad" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"\(val\)/cat are bad"):
        dali.make_loaders(dali.DaliOptions(skip_bad=True), spec_of(table))


@needs_ffcv
def test_a_conversion_and_a_training_from_it_name_them_too(table, tmp_path, capsys):
    assert main(["convert", "--data", str(table), "--output", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().err.startswith(
        f"warning: {table} (train) {TRAIN}note: {table} (val) {VAL}"
    )
    ffcv.make_loaders(ffcv.FfcvOptions(), spec_of(tmp_path / "b"))
    expected = f"warning: {tmp_path}/b/train.beton {TRAIN}note: {tmp_path}/b/val.beton {VAL}"
    assert capsys.readouterr().err == expected


def test_verify_names_classes_that_one_folder_has_alone(photos, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(photos / "val" / "ant", data / "train" / "ant")
    for name in ("ant", "bee"):
        shutil.copytree(photos / "val" / name, data / "val" / name)
    assert main(["verify", str(data)]) == 0
    assert (
        f"warning: {data}/train has no images of 1 of 2 classes (bee): " in capsys.readouterr().err
    )


def test_a_share_for_validation_may_lack_a_class_and_needs_none_that_has_no_images(table, capsys):
    rows = [{"path": f"{i}.jpg", "label": ROWS[i][1], "split": "train"} for i in range(6)]
    rows[5] |= {"split": "test"}
    write_table(table, rows)
    train, val = open_splits(table, SplitOptions(val_fraction=0.5))
    assert train is not None
    announce(train, val)
    kept, given = ({one.classes[label] for label in one.labels} for one in (train, val))
    assert kept == {"ant", "bee"}
    lacking = sorted({"ant", "bee", "cat"} - given)
    err = capsys.readouterr().err
    assert "(train) has no images of 1 of 3 classes (cat): the network" in err
    assert f"(val) has no images of {len(lacking)} of 3 classes ({', '.join(lacking)}): its" in err
    with pytest.raises(UsageError, match=r"--val-fraction 0\.01: leaves val without ant, bee$"):
        open_splits(table, SplitOptions(val_fraction=0.01))


def test_many_classes_are_counted_after_the_first_ones(table, capsys):
    write_table(table, [{"path": "0.jpg", "label": "0", "split": "train"}] + [
        {"path": f"{i % 7}.jpg", "label": str(i), "split": f"test{i}"} for i in range(1, 12)
    ] + [{"path": "1.jpg", "label": "0", "split": "val"}])  # fmt: skip
    announce(*open_splits(table))
    assert (
        "no images of 11 of 12 classes (1, 2, 3, 4, 5 and 6 more): the" in capsys.readouterr().err
    )


def test_a_folder_without_splits_is_of_the_split_that_it_is_given_for(photos, tmp_path):
    (tmp_path / "a").symlink_to(photos / "train")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a").symlink_to(photos / "val")
    train, val = open_splits(tmp_path / "a", SplitOptions(val_data=tmp_path / "b" / "a"))
    assert (train.split, val.split) == ("train", "val")


def test_the_order_of_the_classes_is_the_training_images_whatever_the_validation_images_lack(
    tmp_path,
):
    """Else numbers, which folders sort as text, would come in another order once a class is there."""
    for i, name in enumerate(("train/1", "train/2", "train/10", "val/1", "val/2")):
        (tmp_path / name).mkdir(parents=True)
        write_photo(tmp_path / name / "0.jpg", 40, 40, seed=i)
    options = SplitOptions(val_data=tmp_path / "val")
    lacking, _ = open_splits(tmp_path / "train", options)
    (tmp_path / "val" / "10").mkdir()
    write_photo(tmp_path / "val" / "10" / "0.jpg", 40, 40, seed=9)
    whole, _ = open_splits(tmp_path / "train", options)
    assert lacking.classes == whole.classes == ["1", "10", "2"]


@pytest.mark.usefixtures("table")
def test_weights_that_are_not_written_are_said(tmp_path, capsys):
    rows = [
        {"path": f"{i}.jpg", "label": label, "split": split, "weight": 1 + i}
        for i, (split, label) in enumerate(ROWS)
    ]
    weighted = write_table(tmp_path / "weighted.csv", rows)
    assert main(["shards", "--data", str(weighted), "--output", str(tmp_path / "shards")]) == 0
    assert (
        f"warning: {weighted} (train): the column weight is not written" in capsys.readouterr().err
    )


def test_a_share_for_validation_that_takes_all_images_of_a_class_is_refused(tmp_path):
    names = [f"{i}.jpg" for i in range(8)]
    for i, name in enumerate(names):
        write_photo(tmp_path / name, 40, 40, seed=i)
    place = {
        n: int.from_bytes(hashlib.sha256(n.encode()).digest()[:8], "big") / 2**64 for n in names
    }
    rare = min(names, key=place.get)
    rows = [{"path": name, "label": "rare" if name == rare else "common"} for name in names]
    file = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(UsageError, match="leaves train without rare"):
        open_splits(file, SplitOptions(val_fraction=place[rare] + 1e-6))


def test_classes_beside_one_that_is_called_train_are_not_left_out_without_a_word(tmp_path, capsys):
    for name in ("train/steam/a", "train/electric/b", "car/c", "bus/d", "test/e"):
        write_photo(tmp_path / f"{name}.JPEG", 40, 40, seed=0)
    assert main(["verify", str(tmp_path)]) == 0
    line = f"note: {tmp_path}/train is taken for the images of train; not used are bus, car\n"
    assert line in capsys.readouterr().err

"""Image folders: torchvision's order, and one line for each malformed folder or image."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionFolder

from pipelines.image_formats import decode_error
from pipelines.image_io import images_below
from pipelines.sources.folder import (
    require_apart,
    require_apart_of_both,
    scan_folder,
    scan_train_val,
)
from pipelines.sources.options import SplitOptions
from pipelines.utils.errors import UsageError
from tests.conftest import write_folder, write_photo


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_folder(tmp_path / "train", {"ant": 2, "bee": 1})
    write_folder(tmp_path / "val", {"ant": 1, "bee": 2})
    return tmp_path


def test_images_classes_and_order_are_torchvisions(data):
    write_photo(data / "train" / "bee" / "deeper" / "x.JPG", 50, 50, seed=1)
    (data / "train" / "bee" / "notes.txt").write_text("no image")
    (data / "train" / "ant" / "y.PNG").write_bytes(
        (data / "train" / "ant" / "000.JPEG").read_bytes()
    )
    ours, theirs = scan_folder(data / "train"), TorchvisionFolder(data / "train")
    assert ours.classes == theirs.classes
    assert sorted(zip(ours.paths, ours.labels.tolist(), strict=True)) == sorted(theirs.samples)


def test_a_linked_class_folder_is_followed(data, tmp_path):
    (data / "val" / "bee").rename(tmp_path / "elsewhere")
    (data / "val" / "bee").symlink_to(tmp_path / "elsewhere")
    assert len(scan_folder(data / "val").paths) == 3


def _no_data(data):
    shutil.rmtree(data)
    return f"there is no folder {data}"


def _empty(data):
    shutil.rmtree(data / "train")
    shutil.rmtree(data / "val")
    return f"{data} has no folder 'train' .it has no folders."


def _no_val(data):
    shutil.rmtree(data / "val")
    return f"{data} has no folder 'val' .it has train.; --val-data or --val-fraction give others"


def _val_without_images(data):
    shutil.rmtree(data / "val")
    (data / "val").mkdir()
    return f"{data}/val holds no images"


def _flat_val(data):
    shutil.rmtree(data / "val")
    write_photo(data / "val" / "1.JPEG", 50, 50, seed=1)
    return f"{data}/val holds images but no class folders; expected {data}/val/CLASS/IMAGE.JPEG"


def _empty_class(data):
    (data / "train" / "cat").mkdir()
    return f"the class folder {data}/train/cat holds no image"


def _other_classes(data):
    write_folder(data / "train", {"cat": 1, "dog": 1})
    write_folder(data / "val", {"emu": 1})
    return "only in train: cat, dog; only in val: emu"


@pytest.mark.parametrize(
    "damage",
    [_no_data, _empty, _no_val, _val_without_images, _flat_val, _empty_class, _other_classes],
)
def test_a_malformed_folder_is_explained(data, damage):
    message = damage(data)
    with pytest.raises(UsageError, match=message):
        scan_train_val(data)


def test_an_evaluation_needs_no_training_folder(data):
    shutil.rmtree(data / "train")
    train, val = scan_train_val(data, with_train=False)
    assert train is None
    assert len(val.paths) == 3


def test_an_image_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("it was run"))
    assert "cannot identify image file" in decode_error(path, path.read_bytes())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"])
def test_a_usual_format_is_read_under_any_name(tmp_path, kind):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg", kind)
    assert decode_error("", (tmp_path / "photo.jpg").read_bytes()) is None


def test_links_that_lead_back_are_not_followed_and_others_are(data):
    album = data / "val" / "bee"
    for name in ("x", "y"):
        (album / name).symlink_to(album)
    (album / "up").symlink_to("../..")
    (album / "other").symlink_to(data / "train" / "ant")
    inside = [Path(p).relative_to(album) for p in images_below(album)]
    assert sum(p.parts[0] == "other" for p in inside) == 2
    assert len(inside) == 4


def test_a_good_image_is_not_broken(data):
    assert decode_error("", (data / "train" / "ant" / "000.JPEG").read_bytes()) is None


@pytest.mark.parametrize(
    ("data", "output", "whole", "among"),
    [
        ("d", "d/train/out", False, "d/train"),
        ("d", "d/val", False, "d/val"),
        ("linked", "d/val/a/b", False, "linked/val"),
        ("d/val", "d/val/out", True, "d/val"),
        ("d/val", "d/val/out", False, None),
        ("d", "d/out", True, None),  # beside train/ and val/
        ("d", "d/trained", False, None),
        ("tars", "tars/out", True, None),
        ("labels.csv", "labels.csv.out", True, None),
        ("s3://b/d", "out", True, None),
    ],
)
def test_what_would_be_taken_for_a_class_is_not_written(
    data, output, whole, among, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("d/train", "d/val", "tars"):
        Path(folder).mkdir(parents=True)
    Path("tars/train-0.tar").touch()
    Path("labels.csv").touch()
    Path("linked").symlink_to("d")
    if among is None:
        require_apart(Path(output), data, whole=whole)
        return
    with pytest.raises(UsageError, match=f"^--output: {output} lies among the images of {among}; "):
        require_apart(Path(output), data, whole=whole)


def test_nor_is_it_among_validation_images_of_their_own(tmp_path):
    for folder in ("t/train", "v/ant"):
        (tmp_path / folder).mkdir(parents=True)
    options = SplitOptions(val_data=tmp_path / "v")
    require_apart_of_both(tmp_path / "out", tmp_path / "t", options)
    with pytest.raises(UsageError, match=r"^--output: .*/v/run lies among the images of .*/v; "):
        require_apart_of_both(tmp_path / "v" / "run", tmp_path / "t", options)

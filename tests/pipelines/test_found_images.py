"""Which files of a folder are images, which are passed over, and that both are said."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from pipelines.image_io import images_below
from pipelines.sources.folder import scan_folder, scan_train_val
from pipelines.sources.splits import announce
from pipelines.utils.errors import UsageError
from pipelines.utils.text import distinct
from tests.conftest import needs_ffcv, write_folder
from tests.helpers.bad_images import loaders_of
from tests.helpers.betons import loaders_of as beton_loaders_of


def _rename(folder: Path, suffixes: dict[str, str]) -> None:
    for name, suffix in suffixes.items():
        (folder / name).rename((folder / name).with_suffix(suffix))


def test_other_names_of_jpegs_are_images_and_the_rest_is_counted(data):
    ant = data / "train" / "ant"
    _rename(ant, {"000.JPEG": ".jfif", "001.JPEG": ".JPE", "002.JPEG": ".heic", "003.JPEG": ""})
    _rename(ant, {"004.JPEG": ".HEIC"})
    (ant / "._005.JPEG").write_bytes(b"\0\5\x16\7")  # a Mac's attributes of 005.JPEG
    folder = scan_folder(data / "train")
    assert folder.passed_over == {".heic": 2, "without suffix": 1, "hidden": 1}
    assert folder.counted == (
        "22 images of 2 classes; 4 other files passed over (.heic 2, hidden 1, without suffix 1)"
    )


def test_verify_training_and_conversion_say_what_was_counted(data, run, capsys):
    (data / "val" / "bee" / "notes.txt").touch()
    lines = (
        f"{data}/train: 25 images of 2 classes\n",
        f"{data}/val: 25 images of 2 classes; 1 other files passed over (.txt 1)\n",
    )
    _, out, _ = run(data)
    assert all(line in out for line in lines)
    loaders_of(data)
    out = capsys.readouterr().out
    assert all(line in out for line in lines)
    loaders_of(data, rank=1)
    assert not capsys.readouterr().out


@needs_ffcv
def test_beton_files_say_it_too(data, tmp_path, convert, capsys):
    assert (
        f"{data}/val: 25 images of 2 classes\n"
        in convert("--data", data, "--output", tmp_path / "b")[1]
    )
    beton_loaders_of(tmp_path / "b")
    assert f"{tmp_path}/b/val.beton: 25 images of 2 classes\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", ".git"])
def test_folders_of_other_programs_are_neither_classes_nor_entered(data, name):
    before = scan_folder(data / "train")
    for place in (data / "train" / name, data / "train" / "ant" / "x" / name / "000.jpg"):
        place.mkdir(parents=True)
        shutil.copy(data / "train" / "ant" / "000.JPEG", place / "THUMB.jpg")
    after = scan_folder(data / "train")
    assert (after.classes, after.paths) == (before.classes, before.paths)


def _names(folder: Path) -> Counter[str]:
    return Counter(Path(path).name for path in images_below(folder))


@pytest.mark.parametrize("link", ["a", "z"])
@pytest.mark.parametrize("target", [".", "..", "../..", "/", "deep", "deep/er", "../bee"])
def test_a_link_to_a_folder_above_or_seen_adds_nothing(data, link, target):
    ant = data / "train" / "ant"
    (ant / "deep" / "er").mkdir(parents=True)
    for place in (ant / "deep", ant / "deep" / "er"):
        shutil.copy(ant / "000.JPEG", place / f"{place.name}.jpg")
    before = scan_folder(data / "train").paths
    (ant / link).symlink_to(target)
    (ant / "deep" / "er" / link).symlink_to(ant / target)
    assert scan_folder(data / "train").paths == before


def test_links_to_folders_elsewhere_are_followed_once(data, tmp_path):
    album = write_folder(tmp_path / "album", {"x": 2, "y": 1})
    (album / "x" / "back").symlink_to(album)
    for name in ("one", "two"):
        (data / "val" / "bee" / name).symlink_to(album)
    (data / "val" / "ant" / "part").symlink_to(album / "y")
    found = scan_folder(data / "val")
    assert [p for p in found.paths if "/two/" in p] == []
    assert sum("/one/" in p for p in found.paths) + sum("/part/" in p for p in found.paths) == 3


def test_a_walk_over_chained_links_ends(data):
    bee = data / "val" / "bee"
    for i in range(30):
        (bee / f"l{i}").symlink_to(bee / f"l{i + 1}" if i < 29 else bee)
    (bee / "self").symlink_to(bee / "self")
    assert sum(_names(bee).values()) == 5


def test_two_classes_in_one_folder_are_refused(data):
    (data / "val" / "cat").symlink_to("bee")
    with pytest.raises(UsageError, match=f"{data}/val/bee and {data}/val/cat are the same folder"):
        scan_folder(data / "val")


def test_a_class_of_other_files_alone_says_which_they_are(data):
    for path in (data / "val" / "bee").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(UsageError, match=r"val/bee holds no image \(.heic 5 are none\)"):
        scan_folder(data / "val")


def test_a_single_class_is_warned_of(data, capsys):
    shutil.rmtree(data / "train" / "bee")
    announce(scan_folder(data / "train"), None)
    assert capsys.readouterr().err == f"warning: {data}/train has a single class, ant\n"


def test_classes_one_level_too_deep_are_warned_of(data, capsys):
    (data / "train" / "images").mkdir()
    for name in ("ant", "bee"):
        (data / "train" / name).rename(data / "train" / "images" / name)
    announce(scan_folder(data / "train"))
    assert capsys.readouterr().err == (
        f"warning: {data}/train has a single class, images, with the folders ant, bee; "
        f"expected {data}/train/CLASS/IMAGE\n"
    )


LOOK_ALIKE = [
    (unicodedata.normalize("NFC", "brûlé"), unicodedata.normalize("NFD", "brûlé")),
    ("ant", "аnt"),  # noqa: RUF001 - the second begins with a Cyrillic letter
    ("ant", "ant "),
    ("ant", "a\u200bnt"),
    ("a b", "a\u00a0b"),
]


@pytest.mark.parametrize(("one", "other"), LOOK_ALIKE)
def test_names_that_look_alike_are_shown_so_that_they_differ(data, one, other):
    (data / "train" / "ant").rename(data / "train" / one)
    (data / "val" / "ant").rename(data / "val" / other)
    with pytest.raises(UsageError) as end:
        scan_train_val(data)
    only_train, only_val = str(end.value).partition("only in train: ")[2].split("; only in val: ")
    assert (only_train, only_val) == (distinct(one), distinct(other))
    assert only_train.isascii() != only_val.isascii() or ascii(only_train) != ascii(only_val)
    assert any(ascii(name) in str(end.value) for name in (one, other))


def test_plain_names_are_shown_as_they_are():
    assert distinct("n01440764") == "n01440764"
    assert distinct("猫") == "猫 ('\\u732b')"
    assert "\n" not in distinct("a\nb")


def test_a_name_that_is_no_text_is_shown():
    assert distinct(os.fsdecode(b"\xff")) == "\\udcff ('\\udcff')"


def test_a_pipe_or_an_image_outside_the_classes_is_no_image_and_said(data):
    ant = data / "train" / "ant"
    os.mkfifo(ant / "pipe.jpg")
    (ant / "link.jpg").symlink_to("pipe.jpg")
    (ant / "dangling.jpg").symlink_to("gone.jpg")
    shutil.copy(ant / "000.JPEG", data / "train" / "photo.jpg")
    folder = scan_folder(data / "train")
    assert folder.passed_over == {"no regular file": 2, "images beside the class folders": 1}
    names = {Path(path).name for path in folder.paths}
    assert "dangling.jpg" in names
    assert not {"pipe.jpg", "link.jpg", "photo.jpg"} & names

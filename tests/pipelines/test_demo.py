"""The demo data set: reproducible, varied, with one of each odd file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from pipelines.demo import CLASSES, DemoOptions, write, write_demo
from pipelines.sources.folder import scan_train_val
from pipelines.utils.cli import command
from pipelines.utils.errors import UsageError


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    write(DemoOptions(folder, train=2, val=1))
    return folder


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.JPEG"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_ten_classes_in_train_and_val(demo):
    train, val = scan_train_val(demo)
    assert train.classes == val.classes == sorted(CLASSES)
    assert (len(train.paths), len(val.paths)) == (20, 10)


def test_a_full_disk_leaves_nothing_and_names_the_folder(tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    output = tmp_path / "data"
    assert command("demo", DemoOptions, write_demo, ["--output", str(output)]) == 1
    line = f"demo: error: {output}: No space left on device; free some space there, "
    assert capsys.readouterr().err.startswith(line)
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_writes_the_same_files(demo, tmp_path):
    write(DemoOptions(tmp_path / "again", train=2, val=1))
    write(DemoOptions(tmp_path / "other", train=2, val=1, seed=1))
    assert _hashes(tmp_path / "again") == _hashes(demo)
    assert not set(_hashes(tmp_path / "other").values()) & set(_hashes(demo).values())


def test_train_and_val_have_no_image_in_common(demo):
    assert not set(_hashes(demo / "train").values()) & set(_hashes(demo / "val").values())


def test_sides_vary_between_100_and_500_pixels(demo):
    sizes = []
    for file in (demo / "train").rglob("*.JPEG"):
        with Image.open(file) as image:
            sizes.append(image.size)
    assert all(100 <= side <= 500 for size in sizes for side in size)
    assert len({w / h for w, h in sizes}) == len(sizes)


@pytest.mark.parametrize("split", ["train", "val"])
def test_each_odd_kind_is_there_once(demo, split):
    kinds = {"cmyk": 0, "png": 0, "gray": 0, "exif": 0, "progressive": 0}
    for file in (demo / split).rglob("*.JPEG"):
        with Image.open(file) as image:
            kinds["cmyk"] += image.mode == "CMYK"
            kinds["png"] += image.format == "PNG"
            kinds["gray"] += image.mode == "L"
            kinds["exif"] += image.getexif().get(0x0112) == 6
            kinds["progressive"] += "progressive" in image.info
    assert set(kinds.values()) == {1}


def test_an_existing_folder_is_not_touched(tmp_path):
    with pytest.raises(UsageError, match=f"--output: {tmp_path} exists already"):
        write(DemoOptions(tmp_path))

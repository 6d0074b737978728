"""The converter to .beton files: what it stores, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.demo import CLASSES
from pipelines.sources.folder import scan_folder
from tests.conftest import needs_ffcv, write_folder, write_photo
from tests.helpers.betons import pixels_of, reader_of, samples_of, sidecar_of
from tests.pipelines.sources.conftest import write_table

pytestmark = needs_ffcv


def test_jpegs_are_stored_byte_for_byte(demo, tmp_path, convert):
    code, out, _ = convert("--data", demo, "--output", tmp_path / "b")
    assert code == 0
    folder = scan_folder(demo / "train")
    samples = samples_of(tmp_path / "b" / "train.beton")
    same = [
        bytes(data) == Path(path).read_bytes()
        for (_, data, _), path in zip(samples, folder.paths, strict=True)
    ]
    assert same.count(False) == 2  # CMYK and PNG
    assert [label for *_, label in samples] == folder.labels.tolist()
    assert "30 samples of 10 classes" in out
    assert "28 copied, 2 encoded" in out


def test_what_had_to_be_encoded_is_close_to_the_original(demo, tmp_path, convert):
    convert("--data", demo, "--output", tmp_path / "b", "--jpeg-quality", 95)
    for path, pixels in zip(
        scan_folder(demo / "val").paths, pixels_of(tmp_path / "b" / "val.beton"), strict=True
    ):
        original = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert np.abs(original - pixels).mean() < 4


def test_raw_stores_pils_pixels(demo, tmp_path, convert):
    convert("--data", demo, "--output", tmp_path / "b", "--write-mode", "raw")
    for path, pixels in zip(
        scan_folder(demo / "val").paths, pixels_of(tmp_path / "b" / "val.beton"), strict=True
    ):
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(path).convert("RGB")))
    assert sidecar_of(tmp_path / "b" / "val.beton")["stored"] == {"raw": 20}


def test_large_images_are_shrunk_and_small_ones_left(demo, tmp_path, convert):
    convert("--data", demo, "--output", tmp_path / "b", "--max-resolution", 300)
    for path, pixels in zip(
        scan_folder(demo / "val").paths, pixels_of(tmp_path / "b" / "val.beton"), strict=True
    ):
        with Image.open(path) as image:
            scale = min(1, 300 / max(image.size))
            assert pixels.shape[:2] == (round(image.height * scale), round(image.width * scale))
            shrunk = image.convert("RGB").resize(pixels.shape[1::-1], Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(shrunk).astype(int) - pixels).mean() < 6


def test_a_proportion_is_compressed_and_it_is_the_same_each_time(tmp_path, convert):
    data = write_folder(tmp_path / "a" / "train", {"ant": 60}).parent
    for run in ("x", "y"):
        convert(
            "--data", data, "--output", tmp_path / run, "--splits", "train",
            "--write-mode", "proportion", "--compress-probability", 0.3,
        )  # fmt: skip
    modes = [[m for m, *_ in samples_of(tmp_path / run / "train.beton")] for run in ("x", "y")]
    assert modes[0] == modes[1]
    assert 8 <= modes[0].count(0) <= 28


def test_the_bytes_do_not_depend_on_the_workers(demo, tmp_path, convert):
    for workers in (1, 7):
        convert("--data", demo, "--output", tmp_path / str(workers), "--workers", workers)
    one, seven = (sidecar_of(tmp_path / w / "train.beton") for w in ("1", "7"))
    assert one == seven


def test_a_subset_has_its_share_of_every_class(demo, tmp_path, convert):
    code, *_ = convert("--data", demo, "--output", tmp_path / "b", "--subset", 10)
    assert code == 0
    assert [label for *_, label in samples_of(tmp_path / "b" / "train.beton")] == list(range(10))
    assert sidecar_of(tmp_path / "b" / "train.beton")["classes"] == sorted(CLASSES)


def test_the_sidecar_describes_the_file(demo, tmp_path, convert):
    import hashlib

    convert("--data", demo, "--output", tmp_path / "b", "--splits", "val")
    path = tmp_path / "b" / "val.beton"
    content = sidecar_of(path)
    assert content["samples"] == 20
    assert content["bytes"] == path.stat().st_size
    assert content["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert content["settings"]["write_mode"] == "jpg"
    assert content["version"] == 1
    assert sorted(os.listdir(tmp_path / "b")) == ["val.beton", "val.beton.json"]


@pytest.mark.slow
def test_a_sample_larger_than_a_page_is_read_by_ffcv(tmp_path, convert):
    """FFCV's writer refuses what does not fit into its 8 MB; ours makes larger pages."""
    write_photo(tmp_path / "a" / "val" / "x" / "0.JPEG", 60, 80, seed=0)
    write_photo(tmp_path / "a" / "val" / "x" / "1.JPEG", 2000, 2200, seed=1)
    write_photo(tmp_path / "a" / "val" / "x" / "2.JPEG", 90, 80, seed=2)
    arguments = ["--splits", "val", "--write-mode", "raw"]
    assert convert("--data", tmp_path / "a", "--output", tmp_path / "b", *arguments)[0] == 0
    path = tmp_path / "b" / "val.beton"
    reader = reader_of(path)
    assert reader.page_size == 1 << 24
    for start, size in zip(reader.alloc_table["ptr"], reader.alloc_table["size"], strict=True):
        assert start // reader.page_size == (start + size - np.uint64(1)) // reader.page_size
    for index, pixels in enumerate(pixels_of(path)):
        expected = Image.open(tmp_path / "a" / "val" / "x" / f"{index}.JPEG")
        np.testing.assert_array_equal(pixels, np.asarray(expected))


def test_a_jpeg_with_a_fault_that_pil_forgives_is_encoded_anew(tmp_path, convert):
    """Bytes too many before its end, as in some of ImageNet: FFCV's decoder reports it as broken."""
    path = tmp_path / "a" / "val" / "x" / "0.JPEG"
    write_photo(path, 100, 100, seed=0)
    path.write_bytes(path.read_bytes()[:-2] + bytes(5) + b"\xff\xd9")
    with Image.open(path) as image:
        expected = np.asarray(image).astype(int)
    code, out, _ = convert("--data", tmp_path / "a", "--output", tmp_path / "b", "--splits", "val")
    assert code == 0
    assert "1 encoded" in out
    assert np.abs(pixels_of(tmp_path / "b" / "val.beton")[0] - expected).mean() < 6


def test_a_second_run_leaves_what_is_there(demo, tmp_path, convert):
    convert("--data", demo, "--output", tmp_path / "b", "--splits", "val")
    before = (tmp_path / "b" / "val.beton").stat()
    code, out, _ = convert("--data", demo, "--output", tmp_path / "b")
    assert code == 0
    assert (
        "val.beton: exists already, converted with the same options from images of the same" in out
    )
    after = (tmp_path / "b" / "val.beton").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert (tmp_path / "b" / "train.beton").exists()


@pytest.mark.parametrize("change", [["--jpeg-quality", 80], ["--subset", 5]])
def test_a_file_made_differently_is_not_overwritten(demo, tmp_path, convert, change):
    convert("--data", demo, "--output", tmp_path / "b", "--splits", "val")
    before = (tmp_path / "b" / "val.beton").read_bytes()
    code, _, err = convert("--data", demo, "--output", tmp_path / "b", "--splits", "val", *change)
    assert code == 2
    assert "val.beton exists already, made from other images or with other options" in err
    assert (tmp_path / "b" / "val.beton").read_bytes() == before


def test_a_file_with_labels_that_were_corrected_since_is_not_taken_for_the_tables(
    tmp_path, convert
):
    def table(*labels: str) -> Path:
        rows = [{"path": f"{i}.jpg", "label": label} for i, label in enumerate(labels)]
        return write_table(tmp_path / "labels.csv", rows)

    for i in range(3):
        write_photo(tmp_path / f"{i}.jpg", 40, 40, seed=i)
    (tmp_path / "2.jpg").write_bytes(b"broken")
    words = ("--output", tmp_path / "b", "--splits", "train", "--skip-bad")
    assert convert("--data", table("ant", "bee", "bee"), *words)[0] == 0
    code, out, _ = convert("--data", table("ant", "bee", "ant"), *words)  # of one that is left out
    assert code == 0
    assert "exists already" in out
    code, _, err = convert("--data", table("bee", "ant", "bee"), *words)
    assert code == 2
    assert "exists already, made from other images or with other options" in err


def test_the_files_are_named_by_the_splits_whatever_the_folders_are_called(demo, tmp_path, convert):
    for source, name in (("train", "a/images"), ("val", "b/images")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(demo / source)
    places = ("--data", tmp_path / "a/images", "--val-data", tmp_path / "b/images")
    assert convert(*places, "--output", tmp_path / "c")[0] == 0
    counts = [len(samples_of(tmp_path / "c" / f"{split}.beton")) for split in ("train", "val")]
    assert counts == [30, 20]


def test_verify_finds_the_broken_samples(demo, tmp_path, convert):
    convert("--data", demo, "--output", tmp_path / "b", "--splits", "val")
    path = tmp_path / "b" / "val.beton"
    code, out, _ = convert("--verify", path)
    assert code == 0
    assert "20 of 20 samples are sound; SHA-256 as written" in out
    starts = reader_of(path).alloc_table["ptr"]  # in the order of the samples
    with path.open("r+b") as file:
        for index in (3, 11):
            file.seek(int(starts[index]) + 200)
            file.write(bytes(300))
    code, out, _ = convert("--verify", path)
    assert code == 1
    lines = [line for line in out.splitlines() if "is broken" in line]
    assert [line.split()[2] for line in lines] == ["3", "11"]
    assert "18 of 20 samples are sound; another SHA-256" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/d"], "--data and --output are needed"),
        (["--data", "/none", "--output", "/tmp/x"], "--data: there is no folder /none"),
        (["--workers", "0"], "--workers 0"),
        (["--subset", "0"], "--subset 0"),
        (["--max-resolution", "5"], "--max-resolution 5"),
        (["--jpeg-quality", "0"], "--jpeg-quality 0"),
        (["--jpeg-quality", "101"], "--jpeg-quality 101"),
        (["--compress-probability", "1.5"], "--compress-probability 1.5"),
        (["--splits", "val", "val"], "--splits: each split once"),
        (["--splits", "test"], "--splits"),
        (["--write-mode", "smart"], "--write-mode"),
        (["--verify", "/none"], "there is no file /none"),
        (["--skip-bda"], "did you mean --skip-bad"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(convert, arguments, message):
    code, out, err = convert(*arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert out == ""

"""The converter: what it stores, what it refuses, and that it leaves nothing half-done."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import ConvertOptions, main
from pipelines.cli import command
from pipelines.demo import CLASSES, DemoOptions, write
from pipelines.folder import scan
from tests.conftest import needs_ffcv, write_folder, write_photo

pytestmark = needs_ffcv
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The demo set, with its CMYK, PNG, grayscale, EXIF-rotated and progressive files."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    write(DemoOptions(folder, train=3, val=2))
    return folder


@pytest.fixture
def convert(capsys):
    """Run a command line in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = command("pipelines.beton", ConvertOptions, main, [str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def _samples(path: Path) -> list[tuple[int, np.ndarray, int]]:
    """(mode, stored bytes, label) of each sample, by FFCV's own reader."""
    from ffcv.reader import Reader

    reader = Reader(str(path))
    sizes = dict(zip(reader.alloc_table["ptr"], reader.alloc_table["size"], strict=True))
    data = np.fromfile(path, np.uint8)
    image, label = (reader.metadata[n] for n in reader.metadata.dtype.names)
    return [
        (int(row["mode"]), data[row["data_ptr"] :][: sizes[row["data_ptr"]]], int(y))
        for row, y in zip(image, label, strict=True)
    ]


def _pixels(path: Path) -> list[np.ndarray]:
    """Each sample decoded, by FFCV's own reader and PIL."""
    import io

    from ffcv.reader import Reader

    metadata = Reader(str(path)).metadata
    shapes = [(int(r["height"]), int(r["width"]), 3) for r in metadata[metadata.dtype.names[0]]]
    return [
        data.reshape(shape)
        if mode == 1
        else np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        for (mode, data, _), shape in zip(_samples(path), shapes, strict=True)
    ]


def _sidecar(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".json").read_text())


def test_jpegs_are_stored_byte_for_byte(demo, tmp_path, convert):
    code, out, _ = convert("--data", demo, "--output", tmp_path / "b")
    assert code == 0
    folder = scan(demo / "train")
    samples = _samples(tmp_path / "b" / "train.beton")
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
        scan(demo / "val").paths, _pixels(tmp_path / "b" / "val.beton"), strict=True
    ):
        original = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert np.abs(original - pixels).mean() < 4


def test_raw_stores_pils_pixels(demo, tmp_path, convert):
    convert("--data", demo, "--output", tmp_path / "b", "--write-mode", "raw")
    for path, pixels in zip(
        scan(demo / "val").paths, _pixels(tmp_path / "b" / "val.beton"), strict=True
    ):
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(path).convert("RGB")))
    assert _sidecar(tmp_path / "b" / "val.beton")["stored"] == {"raw": 20}


def test_large_images_are_shrunk_and_small_ones_left(demo, tmp_path, convert):
    convert("--data", demo, "--output", tmp_path / "b", "--max-resolution", 300)
    for path, pixels in zip(
        scan(demo / "val").paths, _pixels(tmp_path / "b" / "val.beton"), strict=True
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
    modes = [[m for m, *_ in _samples(tmp_path / run / "train.beton")] for run in ("x", "y")]
    assert modes[0] == modes[1]
    assert 8 <= modes[0].count(0) <= 28


def test_the_bytes_do_not_depend_on_the_workers(demo, tmp_path, convert):
    for workers in (1, 7):
        convert("--data", demo, "--output", tmp_path / str(workers), "--workers", workers)
    one, seven = (_sidecar(tmp_path / w / "train.beton") for w in ("1", "7"))
    assert one == seven


def test_a_subset_has_its_share_of_every_class(demo, tmp_path, convert):
    code, *_ = convert("--data", demo, "--output", tmp_path / "b", "--subset", 10)
    assert code == 0
    assert [label for *_, label in _samples(tmp_path / "b" / "train.beton")] == list(range(10))
    assert _sidecar(tmp_path / "b" / "train.beton")["classes"] == sorted(CLASSES)


def test_the_sidecar_describes_the_file(demo, tmp_path, convert):
    import hashlib

    convert("--data", demo, "--output", tmp_path / "b", "--splits", "val")
    path = tmp_path / "b" / "val.beton"
    content = _sidecar(path)
    assert content["samples"] == 20
    assert content["bytes"] == path.stat().st_size
    assert content["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert content["settings"]["write_mode"] == "jpg"
    assert content["version"] == 1
    assert sorted(os.listdir(tmp_path / "b")) == ["val.beton", "val.beton.json"]


def test_a_sample_larger_than_a_page_is_read_by_ffcv(tmp_path, convert):
    """FFCV's writer refuses what does not fit into its 8 MB; ours makes larger pages."""
    write_photo(tmp_path / "a" / "val" / "x" / "0.JPEG", 60, 80, seed=0)
    write_photo(tmp_path / "a" / "val" / "x" / "1.JPEG", 2000, 2200, seed=1)
    write_photo(tmp_path / "a" / "val" / "x" / "2.JPEG", 90, 80, seed=2)
    arguments = ["--splits", "val", "--write-mode", "raw"]
    assert convert("--data", tmp_path / "a", "--output", tmp_path / "b", *arguments)[0] == 0
    from ffcv.reader import Reader

    path = tmp_path / "b" / "val.beton"
    reader = Reader(str(path))
    assert reader.page_size == 1 << 24
    for start, size in zip(reader.alloc_table["ptr"], reader.alloc_table["size"], strict=True):
        assert start // reader.page_size == (start + size - np.uint64(1)) // reader.page_size
    for index, pixels in enumerate(_pixels(path)):
        expected = Image.open(tmp_path / "a" / "val" / "x" / f"{index}.JPEG")
        np.testing.assert_array_equal(pixels, np.asarray(expected))


@pytest.fixture
def broken(tmp_path) -> Path:
    """A folder with an empty, a cut and an HTML file among its good ones."""
    data = write_folder(tmp_path / "broken" / "train", {"ant": 6, "bee": 4}).parent
    shutil.copytree(data / "train", data / "val")
    (data / "train" / "ant" / "002.JPEG").write_bytes(b"")
    cut = data / "train" / "ant" / "004.JPEG"
    cut.write_bytes(cut.read_bytes()[:900])
    (data / "train" / "bee" / "001.JPEG").write_text("<html>404</html>")
    return data


def test_a_broken_image_ends_the_run_with_its_path(broken, tmp_path, convert):
    code, _, err = convert("--data", broken, "--output", tmp_path / "b")
    assert code == 1
    assert f"error: broken image {broken}/train/ant/002.JPEG: " in err
    assert "--skip-bad" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "b").exists() or not os.listdir(tmp_path / "b")


def test_broken_images_can_be_left_out(broken, tmp_path, convert):
    code, out, _ = convert("--data", broken, "--output", tmp_path / "b", "--skip-bad")
    assert code == 0
    assert "train.beton: 7 samples of 2 classes" in out
    assert "3 broken images were left out" in out
    skipped = _sidecar(tmp_path / "b" / "train.beton")["skipped"]
    assert [s["image"] for s in skipped] == ["ant/002.JPEG", "ant/004.JPEG", "bee/001.JPEG"]
    assert all(s["reason"] for s in skipped)
    assert [label for *_, label in _samples(tmp_path / "b" / "train.beton")] == [0] * 4 + [1] * 3


def test_a_dangling_link_is_a_broken_image(tmp_path, convert):
    folder = write_folder(tmp_path / "a" / "val", {"ant": 3})
    (folder / "ant" / "link.JPEG").symlink_to(tmp_path / "nowhere")
    arguments = ["--data", tmp_path / "a", "--output", tmp_path / "b", "--splits", "val"]
    code, _, err = convert(*arguments)
    assert code == 1
    assert f"broken image {folder}/ant/link.JPEG: No such file or directory" in err
    assert convert(*arguments, "--skip-bad")[0] == 0


def _pipe(path: Path) -> str:
    os.mkfifo(path)
    return "it is no regular file"


def _lying_header(path: Path) -> str:
    write_photo(path, 64, 64, seed=0)
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\xc0") + 5  # height and width in the start of frame
    content[at : at + 4] = (65500).to_bytes(2, "big") * 2
    path.write_bytes(content)
    return "could be decompression bomb DOS attack"


def _too_wide(path: Path) -> str:
    Image.new("RGB", (66000, 2)).save(path, "PNG")
    return "2 x 66000 pixels are too many a side; use --max-resolution"


@pytest.mark.parametrize("write_mode", ["jpg", "raw"])
@pytest.mark.parametrize("make", [_pipe, _lying_header, _too_wide])
def test_a_hostile_file_is_a_broken_image(tmp_path, convert, make, write_mode):
    folder = write_folder(tmp_path / "a" / "val", {"ant": 3})
    reason = make(folder / "ant" / "x.JPEG")
    arguments = ["--data", tmp_path / "a", "--output", tmp_path / "b", "--splits", "val"]
    code, _, err = convert(*arguments, "--write-mode", write_mode)
    assert code == 1
    assert f"broken image {folder}/ant/x.JPEG: " in err
    assert reason in err
    assert convert(*arguments, "--write-mode", write_mode, "--skip-bad")[0] == 0


@pytest.mark.parametrize("name", ["val.beton.partial", "val.beton.json", "val.beton.json.partial"])
def test_a_folder_in_the_way_is_named(demo, tmp_path, convert, name):
    (tmp_path / "b" / name).mkdir(parents=True)
    code, _, err = convert("--data", demo, "--output", tmp_path / "b", "--splits", "val")
    assert code == 1
    assert f"cannot write {tmp_path}/b/val.beton" in err
    assert "Is a directory" in err
    assert os.listdir(tmp_path / "b") == [name]


@pytest.mark.parametrize("place", ["train", "val/out"])
def test_an_output_among_the_images_is_refused(demo, convert, place):
    before = sorted(demo.rglob("*"))
    code, _, err = convert("--data", demo, "--output", demo / place)
    assert code == 2
    assert f"--output: {demo}/{place} lies among the images of {demo}/{place.split('/')[0]}" in err
    assert sorted(demo.rglob("*")) == before


def test_a_mistyped_data_folder_leaves_no_output_folder(tmp_path, convert):
    assert convert("--data", tmp_path / "nowhere", "--output", tmp_path / "b")[0] == 2
    assert not (tmp_path / "b").exists()


def test_nothing_but_broken_images_is_an_error(tmp_path, convert):
    folder = write_folder(tmp_path / "a" / "val", {"ant": 2})
    for path in folder.rglob("*.JPEG"):
        path.write_bytes(b"x")
    code, _, err = convert(
        "--data", tmp_path / "a", "--output", tmp_path / "b", "--splits", "val", "--skip-bad"
    )
    assert code == 1
    assert "all 2 images are broken" in err
    assert not os.listdir(tmp_path / "b")


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
    assert np.abs(_pixels(tmp_path / "b" / "val.beton")[0] - expected).mean() < 6


def test_a_second_run_leaves_what_is_there(demo, tmp_path, convert):
    convert("--data", demo, "--output", tmp_path / "b", "--splits", "val")
    before = (tmp_path / "b" / "val.beton").stat()
    code, out, _ = convert("--data", demo, "--output", tmp_path / "b")
    assert code == 0
    assert "val.beton: is there already, with the same options, from images of the same" in out
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


def test_too_little_space_is_said_before_writing(demo, tmp_path, convert, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, out, err = convert("--data", demo, "--output", tmp_path / "b")
    assert code == 2
    assert "to write" in out
    assert "are to be written" in err
    assert "has 1 kB free" in err
    assert not os.listdir(tmp_path / "b")


def test_a_second_conversion_into_the_same_folder_is_refused(demo, tmp_path, convert):
    (tmp_path / "b").mkdir()
    handle = os.open(tmp_path / "b", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    code, _, err = convert("--data", demo, "--output", tmp_path / "b")
    os.close(handle)
    assert code == 2
    assert "another conversion is writing into" in err


def test_a_sample_that_reads_back_differently_is_noticed(demo, tmp_path, convert, monkeypatch):
    from pipelines import beton_convert

    stored = beton_convert.stored_bytes
    monkeypatch.setattr(beton_convert, "stored_bytes", lambda *a: stored(*a)[::-1])
    code, _, err = convert("--data", demo, "--output", tmp_path / "b")
    assert code == 1
    assert "does not read back as it was written" in err
    assert not os.listdir(tmp_path / "b")


def _start(data: Path, output: Path, **options) -> subprocess.Popen:
    words = [sys.executable, "-m", "pipelines.beton", "--data", data, "--output", output]
    return subprocess.Popen(
        [*map(str, words), "--workers", "1"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """As many images as keep the converter busy for seconds: links to one large photo."""
    root = tmp_path_factory.mktemp("many") / "data"
    write_photo(root / "photo.JPEG", 1500, 2000, seed=0)
    for split in ("train", "val"):
        (root / split / "x").mkdir(parents=True)
        for i in range(400):
            (root / split / "x" / f"{i}.JPEG").symlink_to(root / "photo.JPEG")
    return root


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 1 << 23):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_after_kill_9_a_second_run_works(many, tmp_path, convert):
    shared = set(os.listdir("/dev/shm"))
    process = _start(many, tmp_path / "b")
    _wait_for(tmp_path / "b" / "train.beton.partial", process)
    process.kill()
    process.communicate()
    assert sorted(os.listdir(tmp_path / "b")) == ["train.beton.partial"]
    assert set(os.listdir("/dev/shm")) <= shared
    few = write_folder(tmp_path / "few" / "train", {"x": 3}).parent
    shutil.copytree(few / "train", few / "val")
    assert convert("--data", few, "--output", tmp_path / "b")[0] == 0
    assert sorted(os.listdir(tmp_path / "b")) == [
        "train.beton", "train.beton.json", "val.beton", "val.beton.json",
    ]  # fmt: skip


def test_ctrl_c_leaves_nothing_behind(many, tmp_path):
    process = _start(many, tmp_path / "b")
    _wait_for(tmp_path / "b" / "train.beton.partial", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "pipelines.beton: interrupted\n"
    assert not os.listdir(tmp_path / "b")


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(many, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))

    process = _start(many, tmp_path / "b", preexec_fn=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == (
        f"pipelines.beton: error: cannot write {tmp_path}/b/train.beton.partial: File too large\n"
    )
    assert not os.listdir(tmp_path / "b")


def test_verify_finds_the_broken_samples(demo, tmp_path, convert):
    convert("--data", demo, "--output", tmp_path / "b", "--splits", "val")
    path = tmp_path / "b" / "val.beton"
    code, out, _ = convert("--verify", path)
    assert code == 0
    assert "20 of 20 samples are sound; SHA-256 as written" in out
    from ffcv.reader import Reader

    starts = Reader(str(path)).alloc_table["ptr"]  # in the order of the samples
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

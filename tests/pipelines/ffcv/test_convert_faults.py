"""A conversion that fails (bad images, full disks, signals) leaves no half-written file."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from tests.conftest import needs_ffcv, write_folder, write_photo
from tests.helpers.betons import samples_of, sidecar_of

pytestmark = needs_ffcv
ROOT = Path(__file__).parents[3]


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
    assert "lacks 3 of 10 images, which were broken and left out" in out
    skipped = sidecar_of(tmp_path / "b" / "train.beton")["skipped"]
    assert [s["image"] for s in skipped] == ["ant/002.JPEG", "ant/004.JPEG", "bee/001.JPEG"]
    assert all(s["reason"] for s in skipped)
    assert [label for *_, label in samples_of(tmp_path / "b" / "train.beton")] == [0] * 4 + [1] * 3


def test_a_dangling_link_is_a_broken_image(tmp_path, convert):
    folder = write_folder(tmp_path / "a" / "val", {"ant": 3})
    (folder / "ant" / "link.JPEG").symlink_to(tmp_path / "nowhere")
    arguments = ["--data", tmp_path / "a", "--output", tmp_path / "b", "--splits", "val"]
    code, _, err = convert(*arguments)
    assert code == 1
    assert f"broken image {folder}/ant/link.JPEG: No such file or directory" in err
    assert convert(*arguments, "--skip-bad")[0] == 0


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
@pytest.mark.parametrize("make", [_lying_header, _too_wide])
def test_a_hostile_file_is_a_broken_image(tmp_path, convert, make, write_mode):
    folder = write_folder(tmp_path / "a" / "val", {"ant": 3})
    reason = make(folder / "ant" / "x.JPEG")
    arguments = ["--data", tmp_path / "a", "--output", tmp_path / "b", "--splits", "val"]
    code, _, err = convert(*arguments, "--write-mode", write_mode)
    assert code == 1
    assert f"broken image {folder}/ant/x.JPEG: " in err
    assert reason in err
    assert convert(*arguments, "--write-mode", write_mode, "--skip-bad")[0] == 0


@pytest.mark.parametrize("name", ["val.beton.partial", "val.beton.json"])
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


def test_a_file_system_that_is_not_local_is_written_to(demo, tmp_path, convert, monkeypatch):
    """As SMB, FUSE and NFS are: no fsync of folders, no locks, no figure of the free space."""
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    usage = shutil.disk_usage(tmp_path)._replace(total=0, used=0, free=0)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    words = ["--data", demo, "--output", tmp_path / "b", "--splits", "val"]
    code, _, err = convert(*words)
    assert code == 0, err
    assert sorted(os.listdir(tmp_path / "b")) == ["val.beton", "val.beton.json"]


def test_too_little_space_is_said_before_writing(demo, tmp_path, convert, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, out, err = convert("--data", demo, "--output", tmp_path / "b")
    assert code == 1
    assert "to write" in out
    assert "are to be written" in err
    assert "has 1 kB free" in err
    assert not os.listdir(tmp_path / "b")


def test_a_second_conversion_into_the_same_folder_is_refused(demo, tmp_path, convert):
    (tmp_path / "b").mkdir()
    with FileLock(tmp_path / "b" / ".lock"):
        code, _, err = convert("--data", demo, "--output", tmp_path / "b")
    assert code == 2
    assert f"--output: another conversion is writing into {tmp_path}/b" in err
    assert convert("--data", demo, "--output", tmp_path / "b", "--splits", "val")[0] == 0
    assert sorted(os.listdir(tmp_path / "b")) == ["val.beton", "val.beton.json"]


def test_a_finished_conversion_into_a_folder_that_became_read_only_is_there_already(
    demo, tmp_path, convert, monkeypatch
):
    from pipelines.ffcv import convert as beton_convert

    words = ["--data", demo, "--output", tmp_path / "b", "--splits", "val"]
    assert convert(*words)[0] == 0
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path / "b")
    monkeypatch.setattr(beton_convert, "exclusive_lock", None)  # there is no place for its file
    code, out, _ = convert(*words)
    assert code == 0
    assert "exists already" in out


def test_a_sample_that_reads_back_differently_is_noticed(demo, tmp_path, convert, monkeypatch):
    from pipelines.ffcv import convert as beton_convert

    stored = beton_convert.stored_bytes
    monkeypatch.setattr(beton_convert, "stored_bytes", lambda *a: stored(*a)[::-1])
    code, _, err = convert("--data", demo, "--output", tmp_path / "b")
    assert code == 1
    assert "does not read back as it was written" in err
    assert not os.listdir(tmp_path / "b")


def _start(data: Path, output: Path, **options) -> subprocess.Popen:
    words = [sys.executable, "-m", "pipelines.beton", "--data", data, "--output", output]
    return subprocess.Popen(
        [*map(str, words), "--workers", "1"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"PYTHONFAULTHANDLER": "1"}, **options,
    )  # fmt: skip


def _stderr_at_its_end(process: subprocess.Popen) -> str:
    """Of a process that ends within a minute, also on a disk that others keep busy."""
    try:
        return process.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # it prints where its threads are
        pytest.fail(f"still running: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """As many images as keep the converter busy for seconds: links to one large photo."""
    root = tmp_path_factory.mktemp("many") / "data"
    write_photo(root / "photo.JPEG", 1500, 2000, seed=0)
    for split in ("train", "val"):
        for name in ("x", "y"):
            (root / split / name).mkdir(parents=True)
            for i in range(200):
                (root / split / name / f"{i}.JPEG").symlink_to(root / "photo.JPEG")
    return root


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 1 << 23):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.faults
@pytest.mark.slow
def test_after_kill_9_a_second_run_works(many, tmp_path, convert):
    shared = set(os.listdir("/dev/shm"))
    process = _start(many, tmp_path / "b")
    _wait_for(tmp_path / "b" / "train.beton.partial", process)
    process.kill()
    process.communicate()
    assert sorted(os.listdir(tmp_path / "b")) == [".lock", "train.beton.partial"]
    assert set(os.listdir("/dev/shm")) <= shared
    few = write_folder(tmp_path / "few" / "train", {"x": 3, "y": 3}).parent
    shutil.copytree(few / "train", few / "val")
    assert convert("--data", few, "--output", tmp_path / "b")[0] == 0
    assert sorted(os.listdir(tmp_path / "b")) == [
        "train.beton", "train.beton.json", "val.beton", "val.beton.json",
    ]  # fmt: skip


@pytest.mark.faults
@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(many, tmp_path):
    process = _start(many, tmp_path / "b")
    _wait_for(tmp_path / "b" / "train.beton.partial", process)
    process.send_signal(signal.SIGINT)
    err = _stderr_at_its_end(process)
    assert process.returncode == 130
    assert err == "pipelines.beton: interrupted\n"
    assert not os.listdir(tmp_path / "b")


@pytest.mark.faults
@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(many, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))

    process = _start(many, tmp_path / "b", preexec_fn=limit)
    err = _stderr_at_its_end(process)
    assert process.returncode == 1
    assert err == (
        f"pipelines.beton: error: cannot write {tmp_path}/b/train.beton.partial: File too large\n"
    )
    assert not os.listdir(tmp_path / "b")

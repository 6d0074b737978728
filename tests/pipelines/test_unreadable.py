"""What the system does not let us read is neither broken nor empty: the command ends with path and reason."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines import dali, reference
from pipelines.batch import LoaderSpec
from pipelines.dali.decoder import Decoder
from pipelines.sources.folder import scan_folder
from pipelines.utils.errors import DataError, RunError
from pipelines.utils.reading import read_file
from tests.conftest import needs_ffcv
from tests.helpers.bad_images import forbid_reading, truncate
from tests.helpers.betons import loaders_of, sidecar_of
from tests.helpers.formats import SAME

CODES = [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ETIMEDOUT]


@pytest.mark.parametrize("code", CODES)
def test_verify_ends_and_records_and_moves_nothing(data, run, tmp_path, monkeypatch, code):
    image = data / "train" / "ant" / "003.JPEG"
    with monkeypatch.context() as patched:
        forbid_reading(patched, image, code)
        exit_code, _, err = run(data, "--move-to", tmp_path / "bad")
    assert exit_code == 1
    assert f"error: cannot read {image}: {os.strerror(code)}; " in err
    assert err.count("\n") == 1
    assert image.exists()
    assert not (data / "verified.json").exists()
    assert run(data)[0] == 0


def test_verify_takes_a_broken_image_beside_it_for_no_excuse(data, run, monkeypatch):
    """DALI fails on the batch of both."""
    truncate(data / "train" / "ant" / "002.JPEG")
    with monkeypatch.context() as patched:
        forbid_reading(patched, data / "train" / "ant" / "003.JPEG")
        assert run(data)[0] == 1
    assert not (data / "verified.json").exists()


def test_a_file_whose_state_is_unknown_ends_verify(data, run, monkeypatch):
    image, stat = data / "val" / "bee" / "001.JPEG", os.stat

    def refusing(path, *arguments, **options):
        if path == str(image):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refusing)
    code, _, err = run(data)
    assert code == 1
    assert f"cannot read {image}: Stale file handle" in err


def test_a_report_that_cannot_be_read_is_not_to_be_removed(data, run, monkeypatch):
    run(data)

    def refusing(path, *_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_text", refusing)
    code, _, err = run(data)
    assert code == 1
    assert f"cannot read {data}/verified.json: Input/output error" in err
    assert "remove" not in err


@pytest.mark.parametrize("place", ["train", "train/bee", "train/bee/more"])
def test_a_folder_that_cannot_be_listed_is_not_empty(data, monkeypatch, place):
    more = data / "train" / "bee" / "more"
    more.mkdir()
    (data / "train" / "bee" / "000.JPEG").rename(more / "x.JPEG")
    forbid_reading(monkeypatch, data / place)
    with pytest.raises(RunError, match=f"cannot read {data / place}: Permission denied"):
        scan_folder(data / "train")


def test_a_link_that_cannot_be_followed_is_not_passed_over(data, monkeypatch, tmp_path):
    (tmp_path / "album").mkdir()
    (data / "val" / "ant" / "album").symlink_to(tmp_path / "album")
    scandir = os.scandir

    class Entry:
        def __init__(self, entry: os.DirEntry) -> None:
            self.path = entry.path

        def is_dir(self) -> bool:
            if self.path.endswith("album"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.path)
            return Path(self.path).is_dir()

        def is_file(self) -> bool:
            return Path(self.path).is_file()

    class Entries:
        def __init__(self, folder) -> None:
            self.entries = scandir(folder)

        def __enter__(self):
            return map(Entry, self.entries)

        def __exit__(self, *_) -> None:
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Entries)
    with pytest.raises(RunError, match=f"cannot read {data}/val/ant/album: Permission denied"):
        scan_folder(data / "val")


@pytest.mark.parametrize("backend", ["dali", "reference"])
def test_training_names_the_file(data, monkeypatch, backend):
    image = data / "val" / "ant" / "003.JPEG"
    spec = LoaderSpec(data, (32,), 4, torch.device("cpu"))
    loaders = (
        dali.make_loaders(dali.DaliOptions(workers=1), spec)
        if backend == "dali"
        else reference.make_loaders(reference.ReferenceOptions(), spec)
    )
    forbid_reading(monkeypatch, image, errno.EIO)  # DALI reads by itself: its error is made here
    image.write_text("")
    with pytest.raises(RunError, match=f"cannot read {image}: Input/output error"):
        list(loaders.val)


def test_files_that_vanish_while_they_are_verified_are_not_bad(data, run, monkeypatch, tmp_path):
    """As those of a network folder whose connection breaks."""

    def vanishing(decoder, paths):
        if data.exists():
            data.rename(tmp_path / "gone")
        return reasons(decoder, paths)

    reasons = Decoder.reasons
    report = tmp_path / "report.json"
    monkeypatch.setattr(Decoder, "reasons", vanishing)
    code, _, err = run(data, "--report", report, "--workers", 1)
    assert code == 1
    assert f"cannot read {data}/train/ant/000.JPEG: it was there a moment ago" in err
    assert not report.exists()


@needs_ffcv
def test_files_that_vanish_while_they_are_converted_are_not_left_out(
    data, tmp_path, convert, monkeypatch
):
    from pipelines.ffcv.encoder import Encoder

    def vanishing(encoder, place, read, index):
        if index == 5 and data.exists():
            data.rename(tmp_path / "gone")
        return encode(encoder, place, read, index)

    encode = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", vanishing)
    code, _, err = convert("--data", data, "--output", tmp_path / "b", "--skip-bad", "--workers", 1)
    assert code == 1
    assert "it was there a moment ago" in err
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize(
    "where", ["pipelines.dali.decoder.open_image", "pipelines.image_formats.to_rgb"]
)
def test_too_little_memory_is_no_fault_of_the_image(data, run, monkeypatch, where):
    def fails(*_):
        raise MemoryError

    (data / "val" / "ant" / "x.png").write_bytes(SAME["png"])
    monkeypatch.setattr(where, fails)
    code, _, err = run(data)
    assert code == 1
    assert ": not enough memory to decode it; " in err
    assert (
        not (data / "verified.json").exists() or "val" not in (data / "verified.json").read_text()
    )


@needs_ffcv
def test_a_conversion_ends_and_leaves_nothing_out(data, tmp_path, convert, monkeypatch):
    image = data / "train" / "ant" / "003.JPEG"
    arguments = ["--data", data, "--output", tmp_path / "b"]
    with monkeypatch.context() as patched:
        forbid_reading(patched, image)
        code, _, err = convert(*arguments, "--skip-bad")
    assert code == 1
    assert f"error: cannot read {image}: Permission denied" in err
    assert os.listdir(tmp_path / "b") == []
    assert convert(*arguments)[0] == 0
    assert sidecar_of(tmp_path / "b" / "train.beton")["samples"] == 25


@needs_ffcv
def test_a_file_that_lacks_images_says_so_and_is_no_complete_one(data, tmp_path, convert, capsys):
    truncate(data / "train" / "ant" / "003.JPEG")
    arguments = ["--data", data, "--output", tmp_path / "b"]
    lacks = "train.beton: lacks 1 of 25 images, which were broken and left out"
    assert lacks in convert(*arguments, "--skip-bad")[1]
    code, _, err = convert(*arguments)
    assert code == 2
    assert "train.beton exists already, but lacks 1 of 25 images" in err
    code, out, _ = convert(*arguments, "--skip-bad")
    assert code == 0
    assert lacks in out
    assert lacks in convert("--verify", tmp_path / "b" / "train.beton")[1]
    loaders_of(tmp_path / "b")
    assert lacks in capsys.readouterr().out


@needs_ffcv
def test_a_sample_that_cannot_be_read_is_not_broken(beton, convert, monkeypatch):
    def refusing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    val = loaders_of(beton).val
    monkeypatch.setattr(os, "pread", refusing)
    code, out, err = convert("--verify", beton / "val.beton")
    assert code == 1
    assert "is broken" not in out
    assert f"cannot read {beton}/val.beton: Input/output error" in err
    val._beton = replace(val._beton, stamp=None)  # as if it had been open before
    os.truncate(beton / "val.beton", 9_000_000 // 2)  # the compiled reader fails, too
    with pytest.raises(RunError, match=r"val\.beton: Input/output error"):
        list(val)


@pytest.mark.parametrize("make", ["dangling", "loop", "empty", "pipe"])
def test_what_is_no_file_is_broken(tmp_path, make):
    path = tmp_path / "x.jpg"
    match make:
        case "dangling":
            path.symlink_to("nowhere")
        case "loop":
            path.symlink_to(path)
        case "empty":
            path.touch()
        case "pipe":
            os.mkfifo(path)
    with pytest.raises(DataError):
        read_file(path)

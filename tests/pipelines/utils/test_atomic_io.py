"""Files that are never half written, and their hashes."""

from __future__ import annotations

import errno
import os

import pytest

from pipelines.utils.atomic_io import atomic_directory, atomic_write, sha256_file


def test_a_link_under_the_temporary_name_leads_to_no_other_file(tmp_path):
    other, path = tmp_path / "other.txt", tmp_path / "folder" / "tuned.json"
    other.write_text("kept")
    path.parent.mkdir()
    (path.parent / "tuned.json.tmp").symlink_to(other)
    with pytest.raises(OSError, match=r"Too many levels of symbolic links: '.*tuned\.json'"):
        atomic_write(path, b"new", alone=True)
    assert other.read_text() == "kept"
    atomic_write(path, b"new", alone=True)
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()


def test_processes_that_write_one_file_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    """Another one writes the whole file between this one's bytes and their name."""
    path, fsync, others = tmp_path / "tuned.json", os.fsync, [b"the other's", None]

    def fsync_after_the_other(descriptor: int) -> None:
        if data := others.pop(0) if others else None:
            atomic_write(path, data)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_after_the_other)
    atomic_write(path, b"this one's")
    assert path.read_bytes() == b"this one's"
    assert os.listdir(tmp_path) == ["tuned.json"]


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of a write, it names no file


def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(OSError, match="28") as error:
        atomic_write(path, b"new")
    assert str(error.value) == f"[Errno 28] No space left on device: '{path}'"
    assert os.listdir(tmp_path) == ["tuned.json"]
    assert path.read_bytes() == b"old"


def test_a_full_disk_names_the_folder_or_its_file_by_the_final_name(tmp_path):
    path = tmp_path / "release"
    with pytest.raises(OSError, match="28") as error, atomic_directory(path):
        _full()
    assert error.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as error, atomic_directory(path) as temporary:
        (temporary / "none" / "config.json").write_bytes(b"")
    assert error.value.filename == str(path / "none" / "config.json")
    assert os.listdir(tmp_path) == []


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    # The first example of FIPS 180-2.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "x") == expected

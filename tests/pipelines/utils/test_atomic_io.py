"""Files that are never half written, and their hashes."""

from __future__ import annotations

import os

import pytest

from pipelines.utils.atomic_io import atomic_write, sha256_file


def test_a_link_under_the_temporary_name_leads_to_no_other_file(tmp_path):
    other, path = tmp_path / "other.txt", tmp_path / "folder" / "tuned.json"
    other.write_text("kept")
    path.parent.mkdir()
    (path.parent / "tuned.json.tmp").symlink_to(other)
    with pytest.raises(OSError, match=r"tuned\.json\.tmp"):
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


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    # The first example of FIPS 180-2.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "x") == expected

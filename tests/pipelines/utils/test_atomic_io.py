"""Files that are never half written, and their hashes."""

from __future__ import annotations

import pytest

from pipelines.utils.atomic_io import atomic_write, sha256_file


def test_a_link_under_the_temporary_name_leads_to_no_other_file(tmp_path):
    other, path = tmp_path / "other.txt", tmp_path / "folder" / "tuned.json"
    other.write_text("kept")
    path.parent.mkdir()
    (path.parent / "tuned.json.tmp").symlink_to(other)
    with pytest.raises(OSError, match=r"tuned\.json\.tmp"):
        atomic_write(path, b"new")
    assert other.read_text() == "kept"
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    # The first example of FIPS 180-2.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "x") == expected

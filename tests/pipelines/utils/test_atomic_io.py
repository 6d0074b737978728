"""Files that are never half written."""

from __future__ import annotations

import pytest

from pipelines.utils.atomic_io import atomic_write


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

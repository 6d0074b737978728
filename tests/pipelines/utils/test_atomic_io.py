"""Files that are never half written, and their hashes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil

import pytest

from pipelines.utils import output
from pipelines.utils.atomic_io import atomic_directory, atomic_write, free_space, sha256_file


@pytest.fixture(autouse=True)
def _nothing_noted(monkeypatch):
    monkeypatch.setattr(output, "_noted", set())


def _fails(number: int):
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_is_written_to_and_said_once(
    tmp_path, monkeypatch, capsys, number
):
    monkeypatch.setattr(os, "fsync", _fails(number))
    atomic_write(tmp_path / "x", b"new")
    with atomic_directory(tmp_path / "folder") as folder:
        (folder / "y").touch()
    assert (tmp_path / "x").read_bytes() == b"new"
    assert (tmp_path / "folder" / "y").exists()
    err = capsys.readouterr().err
    assert err.startswith(f"note: {tmp_path / 'x'}: its file system does not support fsync")
    assert os.strerror(number) in err
    assert err.count("\n") == 1


def test_a_disk_that_fails_in_fsync_is_an_error_with_the_path(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", _fails(errno.EIO))
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/x'"):
        atomic_write(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_that_may_not_be_read_is_written_to(tmp_path, monkeypatch):
    real = os.open

    def call(path, flags, *mode):
        if flags == os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", call)
    atomic_write(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_file_system_that_does_not_tell_its_space_has_enough(tmp_path, monkeypatch):
    assert 0 < free_space(tmp_path) <= shutil.disk_usage(tmp_path).total
    for total, free, expected in ((0, 0, float("inf")), (10, 0, 0), (10, 4, 4)):
        usage = shutil.disk_usage(tmp_path)._replace(total=total, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        assert free_space(tmp_path) == expected
    monkeypatch.setattr(shutil, "disk_usage", _fails(errno.ENOSYS))
    assert free_space(tmp_path) == float("inf")
    monkeypatch.setattr(shutil, "disk_usage", _fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        free_space(tmp_path)


def test_what_a_killed_process_of_the_same_number_left_is_not_in_the_way(tmp_path, monkeypatch):
    """In a container it is always 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with contextlib.suppress(KeyboardInterrupt), atomic_directory(tmp_path / "x") as temporary:
        shutil.copytree(temporary, tmp_path / "kept")
        raise KeyboardInterrupt
    (tmp_path / "kept").rename(temporary)
    with atomic_directory(tmp_path / "x"):
        pass
    assert (tmp_path / "x").is_dir()


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

"""What a checkpoint's files are on file systems of all kinds."""

from __future__ import annotations

import os

from rsnet.checkpoint import manager


def test_a_copy_where_there_are_no_hard_links_is_on_the_disk_before_it_gets_its_name(
    tmp_path, monkeypatch
):
    def refuse(*_):
        raise OSError("Operation not supported")

    synced = []
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(
        manager, "fsync", lambda number, path: synced.append((path, os.fstat(number)))
    )
    (tmp_path / "next.pt").write_bytes(b"weights")
    manager.link_or_copy(tmp_path / "next.pt", tmp_path / "last.pt.tmp")
    copy = tmp_path / "last.pt.tmp"
    assert copy.read_bytes() == b"weights"
    assert [(path, found.st_ino) for path, found in synced] == [(copy, copy.stat().st_ino)]


def test_a_run_that_keeps_fewer_checkpoints_than_before_leaves_no_older_ones(tmp_path):
    for keep, steps in ((4, range(4)), (2, [4])):
        store = manager.CheckpointManager(tmp_path, keep)
        for step in steps:
            pending = tmp_path / "next.pt"
            pending.write_bytes(b"%d" % step)
            store.take_in(pending)
    contents = {path.name: path.read_bytes() for path in tmp_path.glob("last*.pt")}
    assert contents == {"last.pt": b"4", "last-1.pt": b"3"}
    assert not list(tmp_path.glob("*last-2*"))

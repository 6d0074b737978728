"""What a checkpoint's files are on file systems of all kinds."""

from __future__ import annotations

import os

from rsnet.checkpoint import io, manager
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig

NETWORK = ModelConfig("parallel_resnet10", 3, (32,), width_mult=0.125, stem="small")


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
    for keep, epochs in ((4, range(4)), (2, [4])):
        store = manager.CheckpointManager(tmp_path, keep)
        for epoch in epochs:
            store.save(Checkpoint(NETWORK, {}, epoch=epoch))
    found = {path.name: io.load(path).epoch for path in tmp_path.glob("last*.pt")}
    assert found == {"last.pt": 4, "last-1.pt": 3}
    assert not list(tmp_path.glob("*last-2*"))


def test_a_checkpoint_that_is_fetched_pushes_out_none_of_a_run_that_keeps_more(tmp_path):
    for keep, data in ((3, b"1"), (3, b"2"), (3, b"3"), (2, b"4")):
        (tmp_path / "next.pt").write_bytes(data)
        manager.CheckpointManager(tmp_path, keep).take_in(tmp_path / "next.pt")
    assert len(list(tmp_path.glob("last*.pt"))) == 3

"""The cache of shards: whole or not there, bounded, shared by processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipelines.sources import remote_reader, shard_cache
from pipelines.sources.remote_reader import ShardReader, _most_at_once
from pipelines.sources.shard_cache import Outcome, ShardCache
from pipelines.storage.remote import RemoteObject
from pipelines.utils.errors import DataError, RunError, UsageError
from tests.helpers import processes

SIZE = 1000


def item(number: int, tag: str = "a") -> RemoteObject:
    return RemoteObject(f"s3://bucket/{number}.tar", SIZE, tag)


def fill(number: int):
    return lambda file: os.pwrite(file, bytes([number]) * SIZE, 0)


def fetch(cache: ShardCache, number: int) -> Outcome:
    return cache.fetch(item(number), fill(number))


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    return ShardCache(tmp_path, 3 * SIZE)


def numbers(cache: ShardCache) -> list[int]:
    return [n for n in range(10) if cache.has(item(n))]


class Recorded:
    """A storage whose objects are their number; `copied` has the numbers in order."""

    def __init__(self) -> None:
        self.copied: list[int] = []
        self.read_by_range: list[int] = []

    def copy(self, wanted: RemoteObject, file: int, _given_up: threading.Event) -> None:
        number = int(wanted.name.removesuffix(".tar"))
        self.copied.append(number)
        fill(number)(file)

    def read(
        self, wanted: RemoteObject, start: int, stop: int, _given_up: threading.Event
    ) -> bytes:
        number = int(wanted.name.removesuffix(".tar"))
        self.read_by_range.append(number)
        return bytes([number]) * (stop - start)


def reader_of(cache: ShardCache, count: int) -> tuple[ShardReader, Recorded]:
    storage = Recorded()
    return ShardReader(storage, [item(n) for n in range(count)], cache), storage  # type: ignore[arg-type]


def age(cache: ShardCache, *of: int) -> None:
    """Let these have been used in this order, long ago."""
    for i, number in enumerate(of):
        os.utime(cache.path_of(item(number)), (i, i))


def test_what_was_used_the_longest_ago_makes_room(cache):
    for number in range(3):
        assert fetch(cache, number) is Outcome.THERE
    age(cache, 1, 0, 2)
    assert fetch(cache, 3) is Outcome.THERE
    assert numbers(cache) == [0, 2, 3]
    age(cache, 0, 2, 3)
    assert fetch(cache, 0) is Outcome.THERE  # a use
    assert fetch(cache, 4) is Outcome.THERE
    assert numbers(cache) == [0, 3, 4]
    reader, _ = reader_of(cache, 5)
    reader.expect(np.array([3, 3]))
    age(cache, 3, 0, 4)
    reader.read(3, 0, 1)
    reader.read(3, 0, 1)  # the last one
    reader.stop()
    assert fetch(cache, 5) is Outcome.THERE
    assert numbers(cache) == [3, 4, 5]


def test_files_that_are_not_the_caches_are_neither_removed_nor_counted(tmp_path):
    mine = [tmp_path / "shards" / "train-000000.tar", tmp_path / "pins" / "mine.json"]
    (tmp_path / "shards" / f"{'0' * 24}-folder").mkdir(parents=True)
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 3 * SIZE)
    cache = ShardCache(tmp_path, 3 * SIZE)
    for number in range(5):
        assert fetch(cache, number) is Outcome.THERE
    assert numbers(cache) == [2, 3, 4]
    assert all(path.read_bytes() == b"x" * 3 * SIZE for path in mine)


def test_what_any_process_pins_stays(cache, tmp_path):
    other = ShardCache(tmp_path, 3 * SIZE)
    other.pin([item(0), item(1)])
    cache.pin([item(2)])
    for number in range(3):
        fetch(cache, number)
    assert fetch(cache, 3) is Outcome.FULL
    other.pin([item(1)])
    assert fetch(cache, 3) is Outcome.THERE
    assert numbers(cache) == [1, 2, 3]


def test_processes_that_need_other_shards_have_their_part_each(cache, tmp_path):
    one, other = ({cache.path_of(item(n)).name for n in of} for of in ([0, 1, 2], [5, 6, 7]))
    second, third = ShardCache(tmp_path, 3 * SIZE), ShardCache(tmp_path, 3 * SIZE)
    assert cache.pin([item(0), item(1), item(2)], one).size == 3 * SIZE
    assert second.pin([item(0)], one).size == 3 * SIZE  # another process of the same run
    assert third.pin([], other).size == SIZE
    third.pin([item(5)], other)
    assert cache.pin([item(0)], one).size == 2 * SIZE
    assert second.pin([], one).size == 2 * SIZE


def test_what_another_version_noted_is_kept_too(cache, tmp_path):
    other = ShardCache(tmp_path, 3 * SIZE)
    other.pin([item(0), item(1)])
    (note,) = (tmp_path / "pins").glob("*.json")
    note.write_text(json.dumps([cache.path_of(item(n)).name for n in (0, 1)]))
    for number in range(3):
        fetch(cache, number)
    assert fetch(cache, 3) is Outcome.THERE
    assert numbers(cache) == [0, 1, 3]


def test_an_object_of_another_tag_is_another_shard(cache):
    fetch(cache, 0)
    assert not cache.has(item(0, "b"))


def test_a_copy_that_fails_leaves_nothing(cache):
    def fail(file: int) -> None:
        os.pwrite(file, b"x" * (SIZE - 1), 0)
        raise DataError("cut off")

    with pytest.raises(DataError, match="cut off"):
        cache.fetch(item(0), fail)
    assert not [*(cache.folder / "shards").iterdir()]
    assert fetch(cache, 0) is Outcome.THERE


def test_a_killed_process_leaves_no_shard_no_lock_and_no_pin(cache, tmp_path):
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from tests.pipelines.sources.test_shard_cache import *;"
        "c = ShardCache(Path(sys.argv[1]), 3 * SIZE); c.pin([item(n) for n in range(3)]);"
        "c.fetch(item(0), lambda f: (print('begun', flush=True), signal.pause()))"
    )
    words = [sys.executable, "-c", script, str(tmp_path), str(processes.ROOT)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    assert fetch(cache, 0) is Outcome.BUSY
    assert not cache.has(item(0))
    for number in (1, 2):
        fetch(cache, number)
    assert fetch(cache, 3) is Outcome.FULL
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert fetch(cache, 3) is Outcome.THERE  # in the place of what the process had begun
    assert numbers(cache) == [1, 2, 3]
    assert fetch(cache, 0) is Outcome.THERE


def test_a_full_disk_is_told_in_one_line(cache, monkeypatch):
    monkeypatch.setattr(shard_cache, "free_space", lambda _: SIZE)
    with pytest.raises(RunError, match=r"--cache: cannot write .*: No space left.*free some space"):
        fetch(cache, 0)
    monkeypatch.undo()

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match="No space left"):
        cache.fetch(item(0), full)
    assert not [*(cache.folder / "shards").iterdir()]


def test_what_is_being_fetched_has_its_room_on_the_disk(cache, monkeypatch):
    monkeypatch.setattr(shard_cache, "SPARE", 0)
    monkeypatch.setattr(shard_cache, "free_space", lambda _: 1.5 * SIZE)

    def copy(_file: int) -> None:
        with pytest.raises(RunError, match="No space left"):
            fetch(cache, 1)

    assert cache.fetch(item(0), copy) is Outcome.THERE


def test_a_full_disk_that_takes_no_notes_ends_the_reads_that_wait(cache, monkeypatch):
    reader, _ = reader_of(cache, 5)
    reader.expect(np.array([0, 1, 2, 3, 4]))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    monkeypatch.setattr(shard_cache, "atomic_write", full)
    with pytest.raises(RunError, match=r"--cache: cannot write .*No space left"):
        [reader.read(number, 0, 1) for number in range(5)]
    reader.stop()


def test_a_folder_that_cannot_be_used_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--cache: \S+file cannot be used"):
        ShardCache(tmp_path / "file", SIZE)


def test_a_disk_that_does_not_tell_its_space_needs_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "free_space", lambda _: float("inf"))
    with pytest.raises(
        UsageError, match=r"--cache: .* does not tell its free space; give --cache-size"
    ):
        ShardCache(tmp_path, None)
    assert ShardCache(tmp_path, SIZE).limit == SIZE


def test_shards_are_fetched_in_the_order_of_their_use_and_no_more_than_fit(cache):
    reader, storage = reader_of(cache, 8)
    order = np.repeat([5, 0, 7, 1, 2, 6], 4)
    reader.expect(order)
    for shard in order.tolist():
        assert reader.read(shard, 10, 5) == bytes([shard]) * 5
        with cache._alone():
            there = {path.stem for path in (cache.folder / "shards").iterdir()}
        assert len({name.removesuffix(".tar") for name in there}) <= 3  # with what is being fetched
    reader.stop()
    assert sorted(storage.copied) == [0, 1, 2, 5, 6, 7]
    assert not storage.read_by_range


def test_processes_of_a_machine_fetch_each_shard_once(tmp_path):
    pairs = [reader_of(ShardCache(tmp_path, 8 * SIZE), 8) for _ in range(3)]
    order = np.repeat(np.arange(8), 6)

    def work(reader: ShardReader) -> None:
        reader.expect(order)
        for shard in order.tolist():
            assert reader.read(shard, 0, 1) == bytes([shard])

    with ThreadPoolExecutor(len(pairs)) as pool:
        list(pool.map(work, [reader for reader, _ in pairs]))
    for reader, _ in pairs:
        reader.stop()
    copied = [number for _, storage in pairs for number in storage.copied]
    assert sorted(copied) == list(range(8))


def trainings_at_once(folder, by_range: bool) -> list[Recorded]:
    """Two, of other data and several epochs, in windows of two shards; a cache holds three."""
    storages: list[Recorded] = []

    def work(number: int) -> None:
        items = [
            RemoteObject(f"s3://{number}/{n}.tar", SIZE, "a", by_range=by_range) for n in range(8)
        ]
        storages.append(storage := Recorded())
        reader = ShardReader(storage, items, ShardCache(folder, 3 * SIZE))  # type: ignore[arg-type]
        order = np.repeat(np.arange(8).reshape(4, 2), 3, axis=0).ravel()
        try:
            for _ in range(3):
                reader.expect(order)
                for shard in order.tolist():
                    assert reader.read(shard, 0, 1) == bytes([shard])
        finally:
            reader.stop()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    return storages


@pytest.mark.usefixtures("short_waits")
def test_two_trainings_share_a_cache_that_is_too_small_for_both(tmp_path):
    for storage in trainings_at_once(tmp_path, by_range=True):
        assert len(storage.copied) <= 3 * 8  # none is fetched twice for an epoch
        assert len(storage.copied) + len(storage.read_by_range) < 3 * 24


@pytest.mark.usefixtures("short_waits")
def test_without_ranges_they_end_or_say_that_there_is_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_reader, "STARVED", 0.2)
    other = ShardCache(tmp_path, 3 * SIZE)
    for number in range(3):
        fetch(other, number)
    other.pin([item(number) for number in range(3)])
    with pytest.raises(RunError, match=r"--cache: there is no room for s3://\d/0.tar"):
        trainings_at_once(tmp_path, by_range=False)
    other.pin([])


def test_a_cache_smaller_than_what_is_open_at_once_is_an_error_with_the_number(cache):
    reader, _ = reader_of(cache, 5)
    with pytest.raises(
        UsageError, match=r"--cache-size 3 kB: shards of 5 kB .* give --cache-size 1MB"
    ):
        reader.expect(np.arange(20) % 5)


def test_the_most_at_once_is_that_of_reads_between_first_and_last():
    sizes = np.array([1, 10, 100])
    assert _most_at_once(np.array([0, 0, 1, 1, 2]), sizes) == 100
    assert _most_at_once(np.array([0, 1, 0, 2]), sizes) == 100
    assert _most_at_once(np.array([0, 1, 2, 0, 1]), sizes) == 111
    assert _most_at_once(np.array([], np.int64), sizes) == 0

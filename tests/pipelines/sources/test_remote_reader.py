"""What the processes of a machine fetch together, where the cache has less than they read."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines.sources import remote_reader
from pipelines.sources.shard_cache import ShardCache
from pipelines.sources.source import SharedReads
from pipelines.windows import ShardSchedule, Windows
from tests.helpers import processes
from tests.pipelines.sources.conftest import many_shards, upload
from tests.pipelines.sources.test_shard_cache import SIZE, Recorded, reader_of


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    return ShardCache(tmp_path, 3 * SIZE)


def read_together(
    folder: Path, fit: int, nodes: tuple[int, ...], node: int, **more
) -> list[Recorded]:
    """The processes of a node, in windows of two of twelve shards; a batch of all has six."""
    shard = np.repeat(np.arange(12), 30)
    ranks = [rank for rank in range(len(nodes)) if nodes[rank] == node]
    storages = []

    def work(rank: int) -> None:
        schedule = ShardSchedule(
            len(shard), 6 // len(ranks), rank, len(nodes), 0, training=True,
            windows=Windows(shard, 2), node_of_rank=nodes, **more,
        )  # fmt: skip
        reader, storage = reader_of(ShardCache(folder, fit * SIZE), 12)
        storages.append(storage)
        shards = shard[schedule.rows_of([*schedule.batches(0)])]
        reads = schedule.reads_of(ranks, 0)
        try:
            reader.expect(shards, reads._replace(what=shard[reads.what]))
            for one in shards.tolist():
                assert reader.read(one, 0, 1) == bytes([one])
        finally:
            reader.stop()

    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(work, ranks))
    return storages


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("fit", [2, 3])
@pytest.mark.parametrize(
    "nodes",
    [(0, 1), (0, 1, 0, 1), pytest.param((0, 0, 0, 1, 1, 1), marks=pytest.mark.slow)],
)
def test_a_node_fetches_its_shards_once_whatever_its_processes_and_where_few_fit(
    tmp_path, nodes, fit
):
    """No process waits for another by itself: one may be as far ahead as the cache lets it."""
    fetched = []
    for node in (0, 1):
        storages = read_together(tmp_path / str(node), fit, nodes, node)
        assert not [number for storage in storages for number in storage.read_by_range]
        fetched.append(sorted(number for storage in storages for number in storage.copied))
    assert [len(set(found)) for found in fetched] == [len(found) for found in fetched] == [6, 6]


@pytest.mark.usefixtures("short_waits")
def test_images_that_come_again_in_an_epoch_are_fetched_once_by_two_processes(tmp_path):
    storages = read_together(tmp_path, 4, (0, 0), 0, repeats=2)
    copied = [number for storage in storages for number in storage.copied]
    assert len(copied) == len(set(copied)) == 6
    assert not [number for storage in storages for number in storage.read_by_range]


@pytest.mark.usefixtures("short_waits")
def test_who_waits_long_for_a_process_that_never_comes_goes_on_alone(cache, monkeypatch):
    monkeypatch.setattr(remote_reader, "STARVED", 0.05)
    reader, storage = reader_of(cache, 6)
    order = np.repeat(np.arange(6), 2)
    reader.expect(order[::2], SharedReads(order, np.arange(0, 12, 2), processes=2))
    assert [reader.read(n, 0, 1) for n in range(6)] == [bytes([n]) for n in range(6)]
    reader.stop()
    assert sorted(storage.copied) == list(range(6))
    assert not storage.read_by_range


@pytest.mark.usefixtures("short_waits")
def test_a_process_that_ends_is_no_longer_waited_for(tmp_path):
    order = np.repeat(np.arange(6), 2)
    shared = [SharedReads(order, np.arange(i, 12, 2), processes=2) for i in range(2)]
    (reader, storage), (other, _) = (reader_of(ShardCache(tmp_path, 3 * SIZE), 6) for _ in shared)
    other.expect(order[1::2], shared[1])
    reader.expect(order[::2], shared[0])
    other.read(0, 0, 1)
    other.stop()
    assert [reader.read(n, 0, 1) for n in range(6)] == [bytes([n]) for n in range(6)]
    reader.stop()
    assert not storage.read_by_range


READER = """
import hashlib, sys
from pathlib import Path
import torch
from pipelines import dali
from pipelines.batch import LoaderSpec

url, cache, size, rank, position = sys.argv[1:]
options = dali.DaliOptions(workers=1, order="shards", order_window=2, cache=Path(cache), cache_size=size)
spec = LoaderSpec(url, (16,), 6, torch.device("cpu"), rank=int(rank), world_size=2, node_of_rank=(0, 0))
loader = dali.make_loaders(options, spec).train
loader.load_state_dict(loader.state_dict() | {"position": int(position)})
for batch in loader:
    print(hashlib.sha256(batch.images[0].numpy().tobytes()).hexdigest(), flush=True)
    sys.stdin.readline()  # a step of all processes
loader.close()
"""


@pytest.mark.slow
def test_processes_whose_cache_has_less_than_the_data_are_killed_and_go_on(s3, tmp_path):
    """One of two is killed while both fetch; what it leaves is whole, or in nobody's way."""
    folder, cache = many_shards(tmp_path), tmp_path / "cache"
    url, size = upload(s3, folder), max(path.stat().st_size for path in folder.glob("train-*"))
    first, steps = 13, 360 // 12

    def started(data: object, position: int) -> list[subprocess.Popen[str]]:
        """Both ranks, in step with each other by their stdin."""
        rest = (data, cache, 3 * size)
        return [
            processes.start(
                [sys.executable, "-c", READER, *rest, rank, position],
                {"MASTER_PORT": "1"}, stdin=subprocess.PIPE, stderr=None,
            )
            for rank in range(2)
        ]  # fmt: skip

    def read(pair: list[subprocess.Popen[str]], count: int) -> list[list[str]]:
        found = []
        for _ in range(count):
            found.append([hash_after(process) for process in pair])
            for process in pair:
                print(file=process.stdin, flush=True)
        return found

    def hash_after(process: subprocess.Popen[str]) -> str:
        return next(line for line in process.stdout if len(line) == 65)

    pair = started(folder, 0)
    expected = read(pair, steps)
    for process in pair:
        process.communicate(timeout=60)
    s3.requests.clear()
    pair = started(url, 0)
    found = read(pair, first)
    for process in reversed(pair):  # torchrun ends the others
        process.kill()
        process.communicate(timeout=60)
    pair = started(url, 12 * first)
    found += read(pair, steps - first)
    for process in pair:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert found == expected
    gets = [path for method, path in s3.requests if method == "GET" and "/train-" in path]
    # Twice what the cache holds: shards that were on their way, and those that had made room for them.
    assert len(gets) <= 11 + 2 * 3
    assert sum(path.stat().st_size for path in (cache / "shards").iterdir()) <= 3 * size
    assert not [*cache.rglob("*.partial")]
    notes = {path.name.partition("-")[0] for path in (cache / "pins").iterdir()}
    assert notes <= {str(process.pid) for process in pair}

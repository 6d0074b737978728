"""Images/s by DALI from a folder, a table, tar shards and object storage of the same photos.

    python -m benchmarks.sources --data /imagenet --folder /tmp/sources

Only what is read from files, warm, and more rounds: of the 16 that count, each of the four stands at every
place in four.

    python -m benchmarks.sources --data /imagenet --folder /tmp/sources --sources table shards --no-cold \
        --samples 0 --rounds 17

Sources take turns, round by round, in an order that changes with the round; the figures to trust are the
ratios within a round with their quartiles, and CPU time where other programs share the machine. Cold: of
files, after the kernel was told to drop them; of S3 (moto's, in a process of its own), with an empty --cache.
Also what the index of --samples samples costs. Prints one JSON object.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from pyarrow import Table, concat_tables, csv

from benchmarks.loaders import images_per_s
from benchmarks.options import at_least, command
from pipelines import dali
from pipelines.batch import Loader, LoaderSpec
from pipelines.sources import shards, tar_index
from pipelines.sources.folder import scan_train_val
from pipelines.sources.shards_options import ShardsOptions, write_shards
from pipelines.sources.source import Source
from pipelines.utils.errors import UsageError

if TYPE_CHECKING:
    from pipelines.dali.loader import DaliLoader

COLD = ", cold"
TIMES = 10  # as large an index, to see what a sample takes


@dataclass(frozen=True)
class Options:
    data: Path
    """Folder with train/ and val/."""

    folder: Path
    """Folder for the table, the shards and the cache; made if there is none."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Output sizes."""

    batch_size: int = 32
    """Images a batch."""

    workers: int = 2
    """DALI's threads."""

    rounds: int = at_least(2, 5)
    """Epochs of each; the first is not counted. Every order of turns comes equally often where the others are
    a multiple of twice the number of those that take turns."""

    sources: tuple[Literal["table", "shards", "s3"], ...] = ("table", "shards", "s3")
    """What is compared with the folder."""

    cold: bool = True
    """Also with nothing kept in memory."""

    shard_size: str = "10MB"
    """Bytes of a shard."""

    window: int = 4
    """Shards that are mixed in order of shards."""

    samples: int = at_least(0, 100_000)
    """Of the index; 0 leaves it out."""


def prepare(options: Options) -> dict[str, Path]:
    """Write the table and the shards, and return --data of each local source."""
    train, val = scan_train_val(options.data)
    assert train is not None
    options.folder.mkdir(parents=True, exist_ok=True)
    table = options.folder / "labels.csv"
    rows = [
        {
            "path": str(Path(source.locate(i)).resolve()),
            "label": source.classes[label],
            "split": source.split,
        }
        for source in (train, val)
        for i, label in enumerate(source.labels.tolist())
    ]
    csv.write_csv(Table.from_pylist(rows), table)
    output = options.folder / "shards"
    write_shards(ShardsOptions(str(options.data), output, shard_size=options.shard_size))
    return {"folder": options.data, "table": table, "shards": output}


@contextmanager
def s3_server(folder: Path) -> Iterator[tuple[str, int]]:
    """Serve the files of a folder from a bucket, by a process of its own; gives their URL, and its number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import s3fs

    words = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, server)
        storage = s3fs.S3FileSystem()
        storage.mkdir("bucket")
        for path in folder.iterdir():
            storage.pipe(f"bucket/photos/{path.name}", path.read_bytes())
        yield "s3://bucket/photos", server.pid
    finally:
        server.terminate()
        server.wait()


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server listens. Raises UsageError if it ends instead."""
    while server.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise UsageError("moto's server does not start: pip install 'moto[s3,server]'")


class Epoch(NamedTuple):
    """What an epoch took. server_cpu_s: of S3's server, whose CPU would be another machine's."""

    images_per_s: float
    cpu_s: float
    server_cpu_s: float


class Contender:
    """A source in an order, whose epochs are timed."""

    def __init__(self, options: Options, data: str | Path, order: dali.DaliOptions) -> None:
        self._data, self._cache = data, order.cache
        spec = LoaderSpec(data, options.sizes, options.batch_size, torch.device("cpu"))
        train = dali.make_loaders(order, spec).train
        assert train is not None
        self._loader: Loader = train

    def epoch(self, number: int, is_cold: bool, server: int | None) -> Epoch:
        """Read an epoch; cold: with nothing kept of the one before. server: its process, if there is one."""
        if is_cold:
            self._forget()
        cpu, of_server = time.process_time(), cpu_s(server)
        speed = images_per_s(self._loader, number)
        return Epoch(speed, time.process_time() - cpu, cpu_s(server) - of_server)

    def _forget(self) -> None:
        if self._cache is not None:
            shutil.rmtree(self._cache / "shards")
            (self._cache / "shards").mkdir()
            return
        for path in Path(self._data).rglob("*.*"):
            if path.is_file():
                file = os.open(path, os.O_RDONLY)
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)


def cpu_s(process: int | None) -> float:
    """Return the seconds of CPU that a process has taken, if there is one."""
    if process is None:
        return 0.0
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def compare(
    options: Options, sources: Mapping[str, str | Path], server: int | None
) -> dict[str, dict[str, float]]:
    """Return the medians of all sources, warm and cold, and ratios to the folder's of the same round."""
    contenders: dict[str, Contender] = {}
    for name, data in sources.items():
        for order in ("random", "shards"):
            if order == "shards" and name in ("folder", "table"):
                continue
            full = name if order == "random" else f"{name}, order shards"
            cache = options.folder / full.replace(", ", "-") if name == "s3" else None
            window = options.window if order == "shards" else None
            chosen = dali.DaliOptions(
                workers=options.workers, order=order, order_window=window, cache=cache
            )
            contenders[full] = Contender(options, data, chosen)
    found: dict[str, list[Epoch]] = {}
    for epoch in range(options.rounds):
        for suffix in (COLD, "") if options.cold else ("",):
            for name in turns([*contenders], epoch):
                if suffix == COLD and name == "table":
                    continue  # it has the folder's files
                took = contenders[name].epoch(epoch, suffix == COLD, server)
                found.setdefault(name + suffix, []).append(took)
                print(epoch, name + suffix, took, file=sys.stderr)
    return {
        name: {
            "images_per_s": statistics.median(epoch.images_per_s for epoch in epochs[1:]),
            **ratios("of_folder", [(e.images_per_s, b.images_per_s) for e, b in pairs[1:]]),
            **ratios("cpu_of_folder", [(e.cpu_s, b.cpu_s) for e, b in pairs[1:]]),
            "server_cpu_s": statistics.median(epoch.server_cpu_s for epoch in epochs[1:]),
        }
        for name, epochs in found.items()
        for base in [
            found[f"folder{COLD}" if name.endswith(COLD) and "s3" not in name else "folder"]
        ]
        for pairs in [list(zip(epochs, base, strict=True))]
    }


def turns(names: list[str], number: int) -> list[str]:
    """Return the order of a round: a rotation and then its reverse, so that each has every place, and stands
    before every other as often as after it.
    """
    first = number // 2 % len(names)
    order = names[first:] + names[:first]
    return order if number % 2 == 0 else order[::-1]


def ratios(name: str, pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Return the median of the rounds' ratios, their quartiles and their number."""
    found = [ours / base for ours, base in pairs]
    low, median, high = np.quantile(found, (0.25, 0.5, 0.75)).tolist()
    return {name: median, f"{name}_low": low, f"{name}_high": high, "rounds": len(found)}


def index_cost(options: Options) -> dict[str, dict[str, float]]:
    """Return what a process of its own takes to open an index, and one of ten times as many samples."""
    few, many, more = (options.folder / "index" / name for name in ("few", "many", "more"))
    for folder, samples in ((few, 100), (many, options.samples)):
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / "train-0.tar", "w") as tar:
            for i in range(samples):
                name = f"n{i % 1000:08}/n{i % 1000:08}_{i}"
                for suffix, data in (("JPEG", bytes(100)), ("cls", str(i % 1000).encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        started = time.perf_counter()
        shards.open_shards(folder, "train")
        made = time.perf_counter() - started
    (index,) = many.glob(".*.parquet")
    more.mkdir(exist_ok=True)
    link = more / "train-0.tar"  # the same file, which the index is of
    link.unlink(missing_ok=True)
    link.hardlink_to(many / link.name)
    found = tar_index.decoded(index.read_bytes())
    assert found is not None
    table = concat_tables([found.table] * TIMES)
    (more / index.name).write_bytes(tar_index.encoded(found._replace(table=table)))
    result = {"index": {"made_s": made}, "larger index": {}}
    for cost, folder in zip(result.values(), (many, more), strict=True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            cost |= pool.apply(opened, (few, folder))
    return result


def opened(few: Path, many: Path) -> dict[str, float]:
    """Return seconds and memory of an index in a process that has opened a small one, with all libraries."""
    kept = [loader_of(shards.open_shards(few, "train"))]
    before, started = memory("VmRSS"), time.perf_counter()
    source = shards.open_shards(many, "train")
    opened_at, index = time.perf_counter(), memory("VmRSS")
    kept.append(loader_of(source))
    loaded_at = time.perf_counter()
    for epoch in range(3):
        order = kept[-1].schedule.rows_of([*kept[-1].schedule.batches(epoch)])
    return {
        "samples": len(source),
        "open_s": opened_at - started,
        "loader_s": loaded_at - opened_at,
        "order_s": (time.perf_counter() - loaded_at) / 3,
        "index_megabytes": index - before,
        "epochs_megabytes": memory("VmRSS") - before,
        "peak_megabytes": memory("VmHWM") - before,
        "bytes_a_sample": (memory("VmRSS") - before) * 1e6 / len(order),
        "file_megabytes": sum(path.stat().st_size for path in many.glob(".*.parquet")) / 1e6,
    }


def loader_of(source: Source) -> DaliLoader:
    """Return the training loader, which has what its checkpoints have of the source."""
    from pipelines.dali.loader import DaliLoader

    spec = LoaderSpec(str(source.data), (32,), 32, torch.device("cpu"))
    options = dali.DaliOptions(workers=1, order="shards")
    loader = DaliLoader(options, spec, source, training=True)
    loader.state_dict()
    loader.schedule.order(0)
    return loader


def memory(name: str) -> float:
    """Return this process's memory in megabytes: VmRSS, or VmHWM, the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(f"{name}:"))


def run(options: Options) -> int:
    """Measure and print."""
    with redirect_stdout(sys.stderr):
        result = measured(options)
    print(json.dumps(result, indent=2))
    return 0


def measured(options: Options) -> dict[str, dict[str, float]]:
    """Return the figures of the index and of all sources, by name."""
    local = prepare(options)
    result = index_cost(options) if options.samples else {}
    chosen = {name: data for name, data in local.items() if name in ("folder", *options.sources)}
    if "s3" not in options.sources:
        return result | compare(options, chosen, None)
    with s3_server(local["shards"]) as (url, server):
        return result | compare(options, {**chosen, "s3": url}, server)


if __name__ == "__main__":
    sys.exit(command("sources", Options, run))

"""Images/s by DALI from a folder, a table, tar shards and object storage of the same photos.

    python -m benchmarks.sources --data /imagenet --folder /tmp/sources

Sources take turns, round by round; the figures to trust are the ratios within a round, and CPU time where
other programs share the machine. Cold: of files, after the kernel was told to drop them; of S3 (moto's, in a
process of its own), with an empty --cache. Also what the index of --samples samples costs. Prints one JSON
object.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import s3fs
import torch
import tyro
from pyarrow import Table, csv

from benchmarks.loaders import images_per_s
from pipelines import dali
from pipelines.batch import Loader, LoaderSpec
from pipelines.dali.loader import DaliLoader
from pipelines.sources import shards
from pipelines.sources.folder import scan_train_val
from pipelines.sources.shards_options import ShardsOptions, write_shards
from pipelines.sources.source import Source

COLD = ", cold"


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

    rounds: int = 5
    """Epochs of each; the first is not counted."""

    shard_size: str = "10MB"
    """Bytes of a shard."""

    window: int = 4
    """Shards that are mixed in order of shards."""

    samples: int = 100_000
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
def s3_server(folder: Path) -> Iterator[str]:
    """Serve the files of a folder from a bucket, by a process of its own; gives their URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    words = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        storage = s3fs.S3FileSystem()
        storage.mkdir("bucket")
        for path in folder.iterdir():
            storage.pipe(f"bucket/photos/{path.name}", path.read_bytes())
        yield "s3://bucket/photos"
    finally:
        server.terminate()
        server.wait()


def wait_for(port: int) -> None:
    """Wait until a server listens."""
    while True:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


class Contender:
    """A source in an order, whose epochs are timed."""

    def __init__(self, options: Options, data: str | Path, order: dali.DaliOptions) -> None:
        self._data, self._cache = data, order.cache
        spec = LoaderSpec(data, options.sizes, options.batch_size, torch.device("cpu"))
        train = dali.make_loaders(order, spec).train
        assert train is not None
        self._loader: Loader = train

    def epoch(self, number: int, is_cold: bool) -> tuple[float, float]:
        """Return images/s, and this process's CPU seconds; cold: with nothing kept of the epoch before."""
        if is_cold:
            self._forget()
        cpu = time.process_time()
        speed = images_per_s(self._loader, number)
        return speed, time.process_time() - cpu

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


def compare(options: Options, sources: dict[str, str | Path]) -> dict[str, dict[str, float]]:
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
    found: dict[str, list[tuple[float, float]]] = {}
    for epoch in range(options.rounds):
        for suffix in (COLD, ""):
            for name, contender in contenders.items():
                if suffix == COLD and name == "table":
                    continue  # it has the folder's files
                found.setdefault(name + suffix, []).append(contender.epoch(epoch, suffix == COLD))
    return {
        name: {
            "images_per_s": statistics.median(speed for speed, _ in pairs[1:]),
            "of_folder": ratio([speed for speed, _ in pairs], [s for s, _ in found[base]]),
            "cpu_of_folder": ratio([cpu for _, cpu in pairs], [c for _, c in found[base]]),
        }
        for name, pairs in found.items()
        for base in [f"folder{COLD}" if name.endswith(COLD) and "s3" not in name else "folder"]
    }


def ratio(ours: list[float], others: list[float]) -> float:
    """Return the median over the rounds but the first."""
    return statistics.median(a / b for a, b in zip(ours[1:], others[1:], strict=True))


def index_cost(options: Options) -> dict[str, float]:
    """Return the seconds that an index takes to make, and what a process of its own takes to open it."""
    few, many = (options.folder / "index" / name for name in ("few", "many"))
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
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return {"samples": options.samples, "made_s": made} | pool.apply(opened, (few, many))


def opened(few: Path, many: Path) -> dict[str, float]:
    """Return seconds and memory of an index in a process that has opened a small one, with all libraries."""
    kept = [loader_of(shards.open_shards(few, "train"))]
    before, started = memory("VmRSS"), time.perf_counter()
    source = shards.open_shards(many, "train")
    opened_at = time.perf_counter()
    kept.append(loader_of(source))
    return {
        "open_s": opened_at - started,
        "loader_s": time.perf_counter() - opened_at,
        "megabytes": memory("VmRSS") - before,
        "peak_megabytes": memory("VmHWM") - before,
        "file_megabytes": sum(path.stat().st_size for path in many.glob(".*.parquet")) / 1e6,
    }


def loader_of(source: Source) -> DaliLoader:
    """Return the training loader, which has what its checkpoints have of the source."""
    spec = LoaderSpec(str(source.data), (32,), 32, torch.device("cpu"))
    options = dali.DaliOptions(workers=1, order="shards")
    loader = DaliLoader(options, spec, source, training=True)
    loader.state_dict()
    return loader


def memory(name: str) -> float:
    """Return this process's memory in megabytes: VmRSS, or VmHWM, the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(f"{name}:"))


def main(options: Options) -> None:
    """Measure and print."""
    result: dict[str, dict[str, float]] = {}
    if options.samples:
        result["index"] = index_cost(options)
    local = prepare(options)
    with s3_server(local["shards"]) as url:
        print(json.dumps(result | compare(options, {**local, "s3": url}), indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options))

"""Images/s by DALI from a folder, a table and tar shards of the same photos, alternating in one run.

    python -m benchmarks.sources --data /imagenet --folder /tmp/sources

Also seconds and memory that the index of --samples samples in shards takes to open. The figures to trust are
the ratios. Prints one JSON object.
"""

from __future__ import annotations

import io
import json
import resource
import statistics
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from pyarrow import Table, csv

from benchmarks.loaders import images_per_s
from pipelines import dali
from pipelines.batch import Loader, LoaderSpec
from pipelines.sources import shards
from pipelines.sources.folder import scan_train_val
from pipelines.sources.shards_options import ShardsOptions, write_shards


@dataclass(frozen=True)
class Options:
    data: Path
    """Folder with train/ and val/."""

    folder: Path
    """Folder for the table and the shards; made if there is none."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Output sizes."""

    batch_size: int = 32
    """Images a batch."""

    workers: int = 2
    """DALI's threads."""

    rounds: int = 5
    """Epochs of each; the first is not counted."""

    samples: int = 100_000
    """Of the index."""


def prepare(options: Options) -> dict[str, Path]:
    """Write the table and the shards, and return --data of each source."""
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
    write_shards(ShardsOptions(str(options.data), output, shard_size="100MB"))
    return {"folder": options.data, "table": table, "shards": output}


def open_index(options: Options) -> dict[str, float]:
    """Return the seconds that an index takes to make, and seconds and megabytes that it takes to open."""
    folder = options.folder / "index"
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for i in range(options.samples):
            name = f"n{i % 1000:08}/n{i % 1000:08}_{i}"
            for suffix, data in (("JPEG", bytes(100)), ("cls", str(i % 1000).encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        shards.open_shards(folder, "train")
        seconds.append(time.perf_counter() - started)
    before = peak_memory()
    kept = [shards.open_shards(folder, "train") for _ in range(10)]
    megabytes = (peak_memory() - before) / len(kept)
    return {
        "samples": options.samples,
        "made_s": seconds[0],
        "open_s": seconds[1],
        "megabytes": megabytes,
    }


def peak_memory() -> float:
    """Return this process's peak so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main(options: Options) -> None:
    """Measure and print."""
    index = open_index(options)
    loaders: dict[str, Loader] = {}
    for name, data in prepare(options).items():
        spec = LoaderSpec(data, options.sizes, options.batch_size, torch.device("cpu"))
        train = dali.make_loaders(dali.DaliOptions(workers=options.workers), spec).train
        assert train is not None
        loaders[name] = train
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for epoch in range(options.rounds):
        for name, loader in loaders.items():
            speeds[name].append(images_per_s(loader, epoch))
    result = {
        name: {
            "images_per_s": statistics.median(found[1:]),
            "of_folder": statistics.median(
                a / b for a, b in zip(found[1:], speeds["folder"][1:], strict=True)
            ),
        }
        for name, found in speeds.items()
    }
    print(json.dumps(result | {"index": index}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options))

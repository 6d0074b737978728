"""Images/s of the loaders on the same photos, alternating in one run.

    python -m benchmarks.loaders --data /imagenet --workers 2
    python -m benchmarks.loaders --data /imagenet --workers 2 --beton /imagenet_beton /imagenet_400

All read the same samples with the same crops, and give finished batches. For each folder of .beton files
there is also the same decoding without any resize, and what a GPU's host has to do: the resized bytes,
which the GPU normalises. The figures to trust are the ratios: all are measured on the same machine within
seconds of each other. Prints one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numba import njit

from benchmarks.options import at_least, command, require_beton
from pipelines import dali, ffcv, reference
from pipelines.batch import Loader, Loaders, LoaderSpec
from pipelines.ffcv.beton import Samples, open_beton
from pipelines.ffcv.decode import FINE, Job, decode, training_views
from pipelines.sampler import Indices, crop_params


@dataclass(frozen=True)
class Options:
    data: Path
    """Folder with train/ and val/."""

    beton: tuple[Path, ...] = ()
    """Folders with train.beton and val.beton, made of the same images."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Output sizes."""

    batch_size: int = 32
    """Images a batch."""

    workers: int = 2
    """The reference's processes, DALI's and FFCV's threads."""

    rounds: int = at_least(2, 5)
    """Epochs of each; the first is not counted."""


def images_per_s(loader: Loader, epoch: int) -> float:
    loader.set_epoch(epoch)
    start, images = time.perf_counter(), 0
    for batch in loader:
        images += len(batch.labels)
    if batch.images[0].is_cuda:
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


class HostOnly:
    """What the CPU does of FFCV's work: decoding alone, or all that a GPU leaves to it."""

    def __init__(self, folder: Path, options: Options) -> None:
        self._beton = open_beton(folder / "train.beton")
        self._options = options

    def images_per_s(self, work: Callable[[int, Indices], None]) -> float:
        """Return images/s over the training samples, divided equally among the threads."""
        count, workers = len(self._beton), self._options.workers
        with self._beton.path.open("rb", buffering=0) as file, ThreadPoolExecutor(workers) as pool:

            def run(worker: int) -> None:
                for first in range(32 * worker, count, 32 * workers):
                    indices = np.arange(first, min(first + 32, count))
                    work(file.fileno(), indices)

            start = time.perf_counter()
            list(pool.map(run, range(workers)))
            return count / (time.perf_counter() - start)

    def decode(self, file: int, indices: Indices) -> None:
        decode_all(file, self._beton.samples.take(indices))

    def resize(self, file: int, indices: Indices) -> None:
        sizes, count = self._options.sizes, len(indices)
        outs = tuple(np.empty((count, s, 3 * s), np.uint8) for s in sizes)
        status = np.empty(count, np.uint8)
        params = crop_params(0, 0, indices, len(sizes), "independent")
        job = Job(self._beton.samples.take(indices), None, outs, status)
        training_views(file, job, 0, count, params)
        assert not status.any()


@njit(nogil=True)
def decode_all(file: int, samples: Samples) -> None:
    for i in range(len(samples.pointer)):
        status, _ = decode(file, samples, i)
        assert status == FINE


def run(o: Options) -> int:
    for folder in o.beton:
        require_beton(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = LoaderSpec(o.data, o.sizes, o.batch_size, device)
    sources: dict[str, Loaders] = {
        "reference": reference.make_loaders(reference.ReferenceOptions(o.workers), spec),
        "dali": dali.make_loaders(dali.DaliOptions(o.workers), spec),
    }
    hosts: dict[str, HostOnly] = {}
    for folder in o.beton:
        options = ffcv.FfcvOptions(o.workers)
        name = f"ffcv {folder.name}"
        sources[name] = ffcv.make_loaders(options, dataclasses.replace(spec, data=folder))
        hosts[name] = HostOnly(folder, o)
    speeds: dict[str, list[float]] = {}

    def note(epoch: int, name: str, speed: float) -> None:
        if epoch > 0:
            speeds.setdefault(name, []).append(speed)

    for epoch in range(o.rounds):
        for name, loaders in sources.items():
            for split in ("train", "val"):
                note(epoch, f"{name} {split}", images_per_s(getattr(loaders, split), epoch))
            if name in hosts:
                host = hosts[name]
                note(epoch, f"{name} host only", host.images_per_s(host.resize))
                note(epoch, f"{name} decode only", host.images_per_s(host.decode))
    medians = {name: round(statistics.median(s), 1) for name, s in speeds.items()}
    print(
        json.dumps(
            {
                "images_per_s": medians,
                "from_to": {n: [round(min(s), 1), round(max(s), 1)] for n, s in speeds.items()},
                "over_reference": {
                    name: round(speed / medians[f"reference {split}"], 2)
                    for name, speed in medians.items()
                    if (split := name.split()[-1]) in ("train", "val")
                },
                "of_decode_only": {
                    name: {
                        what: round(medians[f"{name} {what}"] / medians[f"{name} decode only"], 2)
                        for what in ("train", "host only")
                    }
                    for name in hosts
                },
                "device": str(device),
                "cpus": len(os.sched_getaffinity(0)),
                "sizes": o.sizes,
                "workers": o.workers,
            },
            indent=2,
        )
    )
    for loaders in sources.values():
        loaders.close()
    return 0


if __name__ == "__main__":
    sys.exit(command("loaders", Options, run))

"""Images/s of the reference loader and of DALI on one folder, alternating in one run.

    python -m benchmarks.loaders --data /imagenet --workers 2

The two read the same samples with the same crops. The figure to trust is the ratio: both are measured
on the same machine within seconds of each other. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from pipelines import dali, reference
from pipelines.batch import Loader, LoaderSpec


@dataclass(frozen=True)
class Options:
    data: Path
    """Folder with train/ and val/."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Output sizes."""

    batch_size: int = 32
    """Images a batch."""

    workers: int = 2
    """The reference's processes, DALI's threads."""

    rounds: int = 5
    """Epochs of each; the first is not counted."""


def images_per_s(loader: Loader, epoch: int) -> float:
    loader.set_epoch(epoch)
    start, images = time.perf_counter(), 0
    for batch in loader:
        images += len(batch.labels)
    if batch.images[0].is_cuda:
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def main(o: Options) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = LoaderSpec(o.data, o.sizes, o.batch_size, device)
    sources = {
        "reference": reference.make_loaders(reference.ReferenceOptions(o.workers), spec),
        "dali": dali.make_loaders(dali.DaliOptions(o.workers), spec),
    }
    speeds: dict[str, list[float]] = {}
    for epoch in range(o.rounds):
        for name, loaders in sources.items():
            for split in ("train", "val"):
                speed = images_per_s(getattr(loaders, split), epoch)
                if epoch > 0:
                    speeds.setdefault(f"{name} {split}", []).append(speed)
    medians = {name: round(statistics.median(s), 1) for name, s in speeds.items()}
    ratios = {
        split: round(medians[f"dali {split}"] / medians[f"reference {split}"], 2)
        for split in ("train", "val")
    }
    spread = {name: [round(min(s), 1), round(max(s), 1)] for name, s in speeds.items()}
    print(
        json.dumps(
            {
                "images_per_s": medians,
                "from_to": spread,
                "dali_over_reference": ratios,
                "device": str(device),
                "cpus": len(os.sched_getaffinity(0)),
                "sizes": o.sizes,
                "workers": o.workers,
            },
            indent=2,
        )
    )
    for loaders in sources.values():
        for loader in loaders[:2]:
            assert loader is not None
            loader.close()


if __name__ == "__main__":
    main(tyro.cli(Options))

"""Space, time and exactness of each way of storing images: the reason for the converter's defaults.

    python -m benchmarks.beton_settings --data /imagenet --output /tmp/settings --workers 2

Converts the photos with four settings, then alternates reading them in one run. The error is the mean
absolute difference, in 1/255, of the finished pictures from the torchvision reference on the original
files; `full` shows what the pipeline itself adds. Prints one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.loaders import images_per_s
from benchmarks.options import at_least, command
from pipelines import ffcv, reference
from pipelines.batch import Loader, LoaderSpec
from pipelines.ffcv import ConvertOptions
from pipelines.ffcv.convert import convert

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "500": {"max_resolution": 500},
    "400": {"max_resolution": 400},
    "raw_400": {"write_mode": "raw", "max_resolution": 400},
}


@dataclass(frozen=True)
class Options:
    data: Path
    """Folder with train/ and val/."""

    output: Path
    """Folder for the .beton files."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Output sizes."""

    workers: int = 2
    """Threads."""

    rounds: int = at_least(2, 4)
    """Epochs of each; the first is not counted."""


def error(loader: Loader, exact: Loader) -> float:
    """Mean absolute difference of all pictures of an epoch, in 1/255."""
    differences = [
        255 * float((x - y).abs().mean())
        for a, b in zip(loader, exact, strict=True)
        for x, y in zip(a.images, b.images, strict=True)
    ]
    return statistics.mean(differences)


def run(o: Options) -> int:
    spec = LoaderSpec(o.data, o.sizes, 20, torch.device("cpu"), normalize="unit")
    exact = reference.make_loaders(reference.ReferenceOptions(o.workers), spec)
    rows: dict[str, dict[str, float]] = {}
    loaders = {}
    for name, settings in SETTINGS.items():
        convert(ConvertOptions(workers=o.workers, **settings), o.data, o.output / name)
        size = (o.output / name / "train.beton").stat().st_size
        folder = dataclasses.replace(spec, data=o.output / name)
        loaders[name] = ffcv.make_loaders(ffcv.FfcvOptions(o.workers), folder)
        assert exact.train is not None
        train = loaders[name].train
        assert train is not None
        rows[name] = {
            "mb": round(size / 1e6, 1),
            "error_train": round(error(train, exact.train), 3),
            "error_val": round(error(loaders[name].val, exact.val), 3),
        }
    for split in ("train", "val"):
        speeds: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for epoch in range(o.rounds):
            for name in SETTINGS:
                speeds[name].append(images_per_s(getattr(loaders[name], split), epoch))
        for name in SETTINGS:
            rows[name][f"images_per_s_{split}"] = round(statistics.median(speeds[name][1:]))
    print(json.dumps(rows, indent=2))
    for pair in [*loaders.values(), exact]:
        pair.close()
    return 0


if __name__ == "__main__":
    sys.exit(command("beton_settings", Options, run))

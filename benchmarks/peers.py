"""Images/s of alternative loaders at one size, beside this project's loaders at one size and at all sizes.

    python -m benchmarks.peers --data /imagenet --beton /imagenet_beton --workers 2

Training batches: a random crop, resized, flipped, normalised, on the device, of the same photos. The others
are torchvision's ImageFolder in PyTorch's DataLoader, timm's loader, and FFCV's own Loader on the same
.beton file; what is not installed is left out. Each keeps its workers from epoch to epoch. They alternate,
epoch by epoch, in one run; the ratio of the speeds of the same round is the figure to trust, and on a
machine that others use, the CPU time of an image. Prints one JSON object.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.gpu.opened import require_photos
from benchmarks.options import at_least, command, note, require_beton
from benchmarks.throughput import ratios
from pipelines import dali, ffcv
from pipelines.batch import Loaders, LoaderSpec
from pipelines.normalize import MEAN_STD

MEAN, STD = MEAN_STD["imagenet"]
Epoch = Callable[[int], Iterable[Any]]  # its number -> batches of images and labels


@dataclass(frozen=True)
class Options:
    data: Path
    """Folder with train/ and val/."""

    beton: Path | None = None
    """Folder with train.beton and val.beton, made of it; unset: FFCV is left out."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """All of this project's; the others have the first alone."""

    batch_size: int = 32
    """Images a batch."""

    workers: int = 2
    """Processes of PyTorch's DataLoader and of timm, threads of the others."""

    rounds: int = at_least(2, 6)
    """Epochs of each; the first is not counted."""


def torchvision_loader(o: Options, device: torch.device) -> Epoch:
    mean, std = ([v / 255 for v in values] for values in (MEAN, STD))
    steps = (
        transforms.RandomResizedCrop(o.sizes[0]),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    )
    loader = DataLoader(
        datasets.ImageFolder(str(o.data / "train"), transforms.Compose(steps)),
        o.batch_size,
        shuffle=True,
        num_workers=o.workers,
        persistent_workers=o.workers > 0,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )
    return lambda _: ((x.to(device, non_blocking=True), y) for x, y in loader)


def timm_loader(o: Options, device: torch.device) -> Epoch:
    import timm.data

    on_gpu = device.type == "cuda"
    loader: Any = timm.data.create_loader(  # type: ignore[attr-defined]
        timm.data.create_dataset("", str(o.data), split="train", is_training=True),  # type: ignore[attr-defined]
        (3, o.sizes[0], o.sizes[0]),
        o.batch_size,
        is_training=True,
        color_jitter=0.0,  # the others have none
        num_workers=o.workers,
        use_prefetcher=on_gpu,
        pin_memory=on_gpu,
        device=device,
    )
    return lambda _: loader


def ffcv_loader(o: Options, device: torch.device) -> Epoch:
    """Its own loader, with the operations of its ImageNet example."""
    import pipelines.ffcv.turbojpeg  # noqa: F401, I001 (imports ffcv, and keeps PyTorch's threads)
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import (
        NormalizeImage,
        RandomHorizontalFlip,
        Squeeze,
        ToDevice,
        ToTensor,
        ToTorchImage,
    )

    assert o.beton is not None
    on_gpu = device.type == "cuda"
    to_device = [ToDevice(device, non_blocking=True)] if on_gpu else []
    normalize = NormalizeImage(np.array(MEAN), np.array(STD), np.float16 if on_gpu else np.float32)
    to_tensor = [ToTensor(), *to_device, ToTorchImage()]
    image = [
        RandomResizedCropRGBImageDecoder((o.sizes[0], o.sizes[0])),
        RandomHorizontalFlip(),
        *([*to_tensor, normalize] if on_gpu else [normalize, *to_tensor]),
    ]
    loader: Any = Loader(
        str(o.beton / "train.beton"),
        batch_size=o.batch_size,
        num_workers=o.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor(), Squeeze(), *to_device]},
    )
    return lambda _: loader


def ours(loaders: Loaders) -> Epoch:
    train = loaders.train
    assert train is not None

    def epoch(number: int) -> Iterable[Any]:
        train.set_epoch(number)
        return train

    return epoch


class Cost(NamedTuple):
    """Of an epoch."""

    images_per_s: float
    cpu_ms: float  # an image, of this process and its children


def cost_of(batches: Iterable[Any], device: torch.device) -> Cost:
    start, used, images = time.perf_counter(), cpu_seconds(), 0
    for _, labels, *_ in batches:
        images += len(labels)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - start
    return Cost(images / took, 1000 * (cpu_seconds() - used) / images)


def cpu_seconds() -> float:
    """Return the CPU seconds used so far by this process and its workers."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def sources(o: Options, device: torch.device) -> tuple[dict[str, Epoch], list[Loaders]]:
    """Return the loaders to compare, by name, and the loaders to close."""
    found = {"torchvision": torchvision_loader(o, device)}
    if importlib.util.find_spec("timm"):
        found["timm"] = timm_loader(o, device)
    with_ffcv = o.beton is not None and importlib.util.find_spec("ffcv") is not None
    if with_ffcv and device.type == "cuda" and not importlib.util.find_spec("cupy"):
        print(
            "FFCV's own loader is left out: it normalises on a GPU by cupy, which is not installed"
        )
    elif with_ffcv:
        found["FFCV's own"] = ffcv_loader(o, device)
    opened = []
    for sizes in (o.sizes[:1], o.sizes):
        spec = LoaderSpec(o.data, sizes, o.batch_size, device)
        opened.append(dali.make_loaders(dali.DaliOptions(o.workers), spec))
        found[name_of("DALI", sizes)] = ours(opened[-1])
        if with_ffcv:
            assert o.beton is not None
            spec = replace(spec, data=o.beton)
            opened.append(ffcv.make_loaders(ffcv.FfcvOptions(o.workers), spec))
            found[name_of("FFCV", sizes)] = ours(opened[-1])
    return found, opened


def name_of(pipeline: str, sizes: tuple[int, ...]) -> str:
    return f"ours, {pipeline}, {len(sizes)} size{'s' if len(sizes) > 1 else ''}"


def run(o: Options) -> int:
    require_photos(o.data)
    if o.beton is not None:
        require_beton(o.beton)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, opened = sources(o, device)
    costs: dict[str, list[Cost]] = {name: [] for name in found}
    for number in range(o.rounds):
        for name, epoch in found.items():
            cost = cost_of(epoch(number), device)
            if number > 0:
                costs[name].append(cost)
        note("images/s", {n: [round(c.images_per_s, 1) for c in each] for n, each in costs.items()})
    for loaders in opened:
        loaders.close()
    speeds = {name: [cost.images_per_s for cost in each] for name, each in costs.items()}
    others = [name for name in found if not name.startswith("ours")]
    all_sizes = [name for name in found if name.endswith(f" {len(o.sizes)} sizes")]
    figures = {
        "images_per_s": {n: round(statistics.median(s), 1) for n, s in speeds.items()},
        "from_to": {n: [round(min(s), 1), round(max(s), 1)] for n, s in speeds.items()},
        "cpu_ms_an_image": {
            n: round(statistics.median(c.cpu_ms for c in each), 2) for n, each in costs.items()
        },
        # A speed is the inverse of a time.
        "speed_of_all_sizes_over_one_of": {
            f"{mine} / {other}": ratios(speeds[mine], speeds[other])
            for mine in all_sizes
            for other in others
        },
        "device": str(device),
        "cpus": len(os.sched_getaffinity(0)),
        "sizes": o.sizes,
        "workers": o.workers,
        "batch_size": o.batch_size,
    }
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(command("peers", Options, run))

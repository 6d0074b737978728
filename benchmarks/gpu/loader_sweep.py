"""Images/s of DALI's loader alone, setting by setting: threads, decoder, prefetch.

    python -m benchmarks.gpu.loader_sweep --data /imagenet --seconds 75

Nothing is trained. A setting takes about four seconds on a GPU; settings that do not fit into the time are
skipped. Prints a line for each, and a JSON object. A training has options for three of them, --workers,
--decoder-hw-load and --prefetch; the others are here to be measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.opened import opened, require_photos
from benchmarks.options import command
from benchmarks.throughput import device_in_use
from pipelines.batch import LoaderSpec
from pipelines.dali import DaliOptions
from pipelines.utils.cores import default_workers
from rsnet.profiler.step_profiler import endless, synchronize

WARM_UP = 4  # batches
ENGINE = 0.65  # of DaliOptions


@dataclass(frozen=True)
class Options:
    data: Path
    """Folder with train/ and val/."""

    seconds: float = 75.0
    """After which no other setting is begun."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Input sizes."""

    batch_size: int = 256
    """Images a batch."""

    batches: int = 24
    """Of each setting."""

    workers: int = field(default_factory=default_workers)
    """DALI's threads, but for the settings that have others."""


class Sweep:
    """Speeds by the name of the setting."""

    def __init__(self, o: Options) -> None:
        self.options = o
        self.found: dict[str, float] = {}
        self._deadline = time.perf_counter() + o.seconds

    def measure(
        self, name: str, change: AbstractContextManager[Any] | None = None, **settings: Any
    ) -> None:
        if time.perf_counter() > self._deadline:
            print(f"{name:34} not tried: out of time", flush=True)
            return
        try:
            with change or nullcontext():
                speed = images_per_s(self.options, **settings)
        except Exception as error:  # the next setting may do
            print(f"{name:34} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
            return
        self.found[name] = round(speed, 1)
        print(f"{name:34} {speed:8.0f} images/s", flush=True)

    def best(self, setting: str, default: float) -> float:
        """The value of the fastest line `setting VALUE`; the default if nothing is faster than without it."""
        speeds = {name: s for name, s in self.found.items() if name.startswith(f"{setting} ")}
        fastest = max(speeds, key=speeds.__getitem__, default="")
        if not fastest or speeds[fastest] <= self.found.get("default again", 0.0):
            return default
        return float(fastest.removeprefix(f"{setting} "))


def images_per_s(
    o: Options,
    split: str = "train",
    sizes: tuple[int, ...] = (),
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> float:
    """Return the images/s of one setting. settings: fields of DaliOptions."""
    device = device_in_use()
    spec = LoaderSpec(o.data, sizes or o.sizes, o.batch_size, device, dtype)
    with opened(spec, DaliOptions(**{"workers": o.workers} | settings)) as loaders:
        source = endless(getattr(loaders, split))
        list(islice(source, WARM_UP))
        synchronize(device)
        start = time.perf_counter()
        images = sum(len(batch.labels) for batch in islice(source, o.batches))
        synchronize(device)
        return images / (time.perf_counter() - start)


@contextmanager
def called_with(module: Any, name: str, **options: Any) -> Iterator[None]:
    """Let DALI's operator have other options."""
    operator: Callable[..., Any] = getattr(module, name)
    with mock.patch.object(module, name, lambda *a, **k: operator(*a, **(k | options))):
        yield


@contextmanager
def crop_decoded_alone() -> Iterator[None]:
    """Let the decoder decode the crop only; on a GPU the pipeline decodes whole photos and crops
    afterwards.
    """
    from nvidia.dali import fn

    def crop(photo: tuple[Any, dict[str, Any]], **rectangle: Any) -> Any:
        encoded, options = photo
        return fn.decoders.image_slice(encoded, **rectangle, **options)

    with (
        mock.patch.object(fn.decoders, "image", lambda encoded, **options: (encoded, options)),
        mock.patch.object(fn, "slice", crop),
    ):
        yield


def run(o: Options) -> int:
    require_photos(o.data)
    sweep = Sweep(o)
    measure = sweep.measure
    measure("default")
    measure("default again")  # the spread
    engine = ENGINE
    if device_in_use().type == "cuda":
        for value in (0.0, 0.3, 0.5, 0.8, 1.0):
            measure(f"decoder-hw-load {value}", decoder_hw_load=value)
        engine = sweep.best("decoder-hw-load", ENGINE)
    cores = len(os.sched_getaffinity(0))
    for workers in (n for n in (2, 4, 8, 12, 16, 24) if n <= cores and n != o.workers):
        measure(f"workers {workers}", workers=workers, decoder_hw_load=engine)
    if device_in_use().type == "cuda":
        _measure_operators(measure, engine, o)
    for prefetch in (1, 4):
        measure(f"prefetch {prefetch}", prefetch=prefetch, decoder_hw_load=engine)
    largest = max(o.sizes)
    measure(f"one size, {largest}", sizes=(largest,), decoder_hw_load=engine)
    measure("float32", dtype=torch.float32, decoder_hw_load=engine)
    measure("evaluation", split="val", decoder_hw_load=engine)
    about = {"sizes": o.sizes, "batch_size": o.batch_size, "workers": o.workers, "cores": cores}
    print(json.dumps(about | {"images_per_s": sweep.found}), flush=True)
    # The last, as it is reported to end the process on some GPUs.
    if device_in_use().type == "cuda":
        measure("crop decoded alone", crop_decoded_alone(), decoder_hw_load=engine)
    return 0 if sweep.found else 1


def _measure_operators(measure: Callable[..., None], engine: float, o: Options) -> None:
    """What the operators of a GPU have options for, and the pipelines none."""
    from nvidia.dali import fn

    decoder = fn.decoders, "image"
    for name, change in {
        "plain upsampling": called_with(*decoder, jpeg_fancy_upsampling=False),
        "Huffman on the GPU, too": called_with(*decoder, hybrid_huffman_threshold=1),
        "memory for 1024 x 1024 ahead": called_with(
            *decoder, preallocate_width_hint=1024, preallocate_height_hint=1024
        ),
        "a size's resizes in one launch": called_with(fn, "resize", minibatch_size=o.batch_size),
    }.items():
        measure(name, change, decoder_hw_load=engine)


if __name__ == "__main__":
    sys.exit(command("gpu.loader_sweep", Options, run))

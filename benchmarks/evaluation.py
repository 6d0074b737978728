"""Images/s of an evaluation at all sizes, beside forwards without folding and the original's way.

    python -m benchmarks.evaluation --arch parallel_resnet50 --batch-size 16

On random images that lie on the device. They alternate in one run; the ratios of the medians are the figures
to trust. Prints one JSON object per network.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.options import at_least, command, note
from benchmarks.plain import ListOfResolutions
from benchmarks.throughput import Options as Workload
from benchmarks.throughput import (
    device_in_use,
    make_batches,
    make_network,
    make_ours,
    require_known,
)
from pipelines.batch import Batch
from rsnet.evaluation.evaluate import evaluate
from rsnet.models.autocast import autocast
from rsnet.profiler import step_profiler as profile


@dataclass(frozen=True)
class Options:
    arch: tuple[str, ...] = ("parallel_resnet18", "parallel_resnet50", "parallel_mobilenetv2")
    """ResNets and MobileNetV2."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Input sizes."""

    batch_size: int = 16
    """Images a batch."""

    batches: int = 12
    """Of each evaluation, which folds BatchNorm once."""

    rounds: int = at_least(2, 4)
    """Evaluations of each; the first is not counted."""


def measure(arch: str, o: Options) -> dict[str, object]:
    ways = make_ways(arch, o)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(o.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            profile.synchronize(device_in_use())
            if i > 0:
                taken[name].append(time.perf_counter() - start)
        note(f"{arch}, seconds", taken)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    images = o.batches * o.batch_size
    return {
        "arch": arch,
        "images_per_s": {name: round(images / s, 1) for name, s in medians.items()},
        "over_original": {n: round(medians["original"] / s, 2) for n, s in medians.items()},
    }


def make_ways(arch: str, o: Options) -> dict[str, Callable[[], object]]:
    device = device_in_use()
    trainer, model = make_ours(arch, Workload(sizes=o.sizes, batch_size=o.batch_size), "auto")
    original = ListOfResolutions(make_network(arch).to(device), len(o.sizes))
    for norms in original.norms.values():
        norms.eval()
    (plain,) = make_batches(Workload(sizes=o.sizes, batch_size=o.batch_size), 1)
    dtype = trainer.amp or torch.float32
    batch = Batch(
        tuple(x.to(dtype, memory_format=torch.channels_last) for x in plain.images), plain.labels
    )

    batches: Any = [batch] * o.batches  # all that `evaluate` needs of a loader

    @torch.no_grad()
    def as_the_original() -> None:
        original.module.eval()
        for _ in range(o.batches):
            original.run(list(plain.images))

    @torch.no_grad()
    def without_folding() -> list[tuple[Tensor, ...]]:
        model.eval()
        with autocast(device, trainer.amp):
            return [model.forward_all(batch.images) for _ in range(o.batches)]

    return {
        "original": as_the_original,
        "unfolded": without_folding,
        "evaluate": lambda: evaluate(model, batches, device, trainer.amp),
    }


def run(o: Options) -> int:
    require_known(o.arch)
    device = device_in_use()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    cpus = len(os.sched_getaffinity(0))
    print(
        json.dumps(
            {"device": name, "cpus": cpus, "torch": torch.__version__, "batch": o.batch_size}
        )
    )
    for arch in o.arch:
        print(json.dumps(measure(arch, o), indent=2), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command("evaluation", Options, run))

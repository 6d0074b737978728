"""The cost of changing the size between two calls.

    python -m benchmarks.switching --arch parallel_resnet18

(a) forwards of one size with its BatchNorm, each after a forward of another size's images with the same
BatchNorm, as in an ordinary network; (b) the same forwards, each after one of the other size with its own:
these switch, and find their BatchNorm out of the caches. They alternate in one run, on one CPU thread, in its
CPU time; the median of the differences of neighbours is the figure to trust, with its interval of 95 %. The
switch alone is timed by itself. Prints one JSON object per network and size.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import timeit
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.options import at_least, command
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.models.switchable import ResolutionSwitchable


@dataclass(frozen=True)
class Options:
    arch: tuple[str, ...] = ("parallel_resnet18", "parallel_resnet50", "parallel_mobilenetv2")
    """Networks."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Input sizes; the largest and the smallest are measured, each beside the other."""

    batch_size: int = 1
    """Images a forward."""

    rounds: int = at_least(4, 100)
    """Forwards of each; a tenth before them is not counted."""


def measure(arch: str, o: Options) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = (
        create_model(ModelConfig(arch, 1000, o.sizes)).eval().to(memory_format=torch.channels_last)
    )
    ends = model.sizes[0], model.sizes[-1]
    images = {
        s: torch.randn(o.batch_size, 3, s, s).contiguous(memory_format=torch.channels_last)
        for s in ends
    }
    alone = microseconds_of_select(model, ends)
    found = []
    for size, other in (ends, ends[::-1]):
        taken = alternate(model, images[size], images[other], o.rounds)
        pairs = zip(taken["switched"], taken["fixed"], strict=True)
        differences = sorted(1e6 * (switched - fixed) for switched, fixed in pairs)
        middle, reach = o.rounds / 2, 0.98 * o.rounds**0.5  # of the ranks of the median, 95 %
        found.append(
            {
                "arch": arch,
                "size": size,
                "after": other,
                "us": {name: round(1e6 * statistics.median(t)) for name, t in taken.items()},
                "difference_us": round(statistics.median(differences)),
                "from_to_us": [round(differences[int(middle + r)]) for r in (-reach, reach)],
                "select_alone_us": round(alone, 1),
            }
        )
    return found


@torch.inference_mode()
def alternate(
    model: ResolutionSwitchable, images: Tensor, other: Tensor, rounds: int
) -> dict[str, list[float]]:
    """CPU seconds of a forward of `images` after one of `other`: without a switch, and with one."""
    taken: dict[str, list[float]] = {"fixed": [], "switched": []}
    size, warm_up = images.shape[-1], rounds // 10
    for i in range(warm_up + rounds):
        for name in taken:
            if name == "fixed":
                model(other, size)
                start = time.process_time()
                model.network(images)
            else:
                model(other)
                start = time.process_time()
                model(images)
            if i >= warm_up:
                taken[name].append(time.process_time() - start)
    return taken


def microseconds_of_select(model: ResolutionSwitchable, sizes: tuple[int, int]) -> float:
    """Of one switch, as the fastest of five times 2,000."""

    def both() -> None:
        for size in sizes:
            model.select(size)

    return min(timeit.repeat(both, timer=time.process_time, number=1000, repeat=5)) / 1000 / 2 * 1e6


def run(options: Options) -> int:
    cpus = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    print(json.dumps({"cpus": cpus, "torch": torch.__version__}))
    for arch in options.arch:
        for result in measure(arch, options):
            print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command("switching", Options, run))

"""What ways to compute one size cost beside one set of weights for all sizes in float32, channels-last.

    python -m benchmarks.inference --batch-size 1
    python -m benchmarks.inference --batch-size 32 --rounds 8 --no-compiled

On one CPU thread, in its CPU time, so that other programs on the machine count little. They alternate in one
run, forward by forward; the ratios of their medians are the figures to trust. Prints one JSON object per
network and size.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.options import command
from rsnet.config.model_config import ModelConfig
from rsnet.distributed.device import keep_freed_memory
from rsnet.inference.runner import ModelRunner
from rsnet.models.factory import create_model
from rsnet.models.fold import fold_batchnorm, plain
from rsnet.models.switchable import ResolutionSwitchable

Way = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    arch: tuple[str, ...] = ("parallel_resnet18", "parallel_resnet50", "parallel_mobilenetv2")
    """Networks."""

    sizes: tuple[int, ...] = (224, 96)
    """Input sizes, one after the other."""

    batch_size: int = 1
    """Images a forward."""

    rounds: int = 40
    """Forwards of each; a tenth before them is not counted."""

    compiled: bool = True
    """With torch.compile, which needs a C++ compiler, and time for each network and size."""

    keep_memory: bool = True
    """Keep the memory that tensors free, as all commands do on a CPU, see `keep_freed_memory`."""


def measure(arch: str, size: int, o: Options) -> dict[str, Any]:
    """Milliseconds of each way, and how often the first way's time each takes less."""
    torch.manual_seed(0)
    model = (
        create_model(ModelConfig(arch, 1000, o.sizes)).eval().to(memory_format=torch.channels_last)
    )
    _give_statistics(model)
    ways = make_ways(model, size, o.compiled)
    x = torch.randn(o.batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = model(x, size)
        off = {name: _difference(way(x), expected) for name, way in ways.items()}
        taken = alternate({name: partial(way, x) for name, way in ways.items()}, o.rounds)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    base = medians["shared weights"]
    return {
        "arch": arch,
        "size": size,
        "batch": o.batch_size,
        "weights_mb": {
            "all sizes": _megabytes(model),
            "one size, folded": _megabytes(fold_batchnorm(model, size)),
        },
        "ms": {name: round(1000 * t, 2) for name, t in medians.items()},
        "times_as_fast": {name: round(base / t, 2) for name, t in medians.items()},
        "difference": {name: float(f"{d:.1e}") for name, d in off.items()},
    }


def make_ways(model: ResolutionSwitchable, size: int, compiled: bool) -> dict[str, Way]:
    """By name: (N, 3, size, size) -> logits."""
    fold = fold_batchnorm(model, size)
    contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    quantize: Any = torch.ao.quantization.quantize_dynamic
    ways: dict[str, Way] = {
        "shared weights": _offered(model, size),
        "folded": _offered(model, size, fold=True),
        "bfloat16": _offered(copy.deepcopy(model), size, torch.bfloat16),
        "bfloat16, folded": _offered(model, size, torch.bfloat16, fold=True),
        "bfloat16, weights in float32": _autocast(lambda x: model(x, size)),
        "contiguous": lambda x: contiguous(x.contiguous(), size),
        "folded, linear layers in int8": quantize(copy.deepcopy(fold), {nn.Linear}),
    }
    if compiled:
        ways["compiled"] = torch.compile(plain(model, size))
        ways["compiled, folded"] = torch.compile(fold)
        ways["compiled, bfloat16, folded"] = torch.compile(_autocast(fold))
    return ways


def _offered(
    model: ResolutionSwitchable, size: int, dtype: torch.dtype | None = None, fold: bool = False
) -> Way:
    """As `SwitchableClassifier.load` computes with these options."""
    forward = ModelRunner(model, torch.device("cpu"), dtype, 1, fold=fold, cuda_graphs=False)
    return lambda x: forward(x if dtype is None else x.to(dtype), size)


def alternate(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    warm_up = max(1, rounds // 10)
    for i in range(warm_up + rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if i >= warm_up:
                taken[name].append(time.process_time() - start)
    return taken


def _autocast(forward: Way) -> Way:
    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(x)

    return call


@torch.no_grad()
def _give_statistics(model: nn.Module) -> None:
    """As after a training, so that the logits are of its scale."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if ".by_resolution." in name and value.is_floating_point():
            value.uniform_(0.5, 1.5)
        if name.endswith(("bias", "running_mean")):
            value.sub_(1)


def _difference(logits: Tensor, expected: Tensor) -> float:
    """The largest, over the largest logit."""
    return ((logits.float() - expected).abs().max() / expected.abs().max()).item()


def _megabytes(network: nn.Module) -> float:
    values = {id(t): t.nbytes for t in (*network.parameters(), *network.buffers())}
    return round(sum(values.values()) / 1e6, 1)


def run(options: Options) -> int:
    warnings.filterwarnings("ignore", ".*torch.ao.quantization.*")
    cpus = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    if options.keep_memory:
        keep_freed_memory(torch.device("cpu"))
    print(json.dumps({"cpus": cpus, "torch": torch.__version__}))
    for arch in options.arch:
        for size in options.sizes:
            print(json.dumps(measure(arch, size, options), indent=1), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command("inference", Options, run))

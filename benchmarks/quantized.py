"""What quantization costs in training: steps of the same network in full precision and quantized.

    python -m benchmarks.quantized --arch parallel_resnet18

They alternate, step by step, in one run; the ratios of their medians are the figures to trust. 2/32 stands
beside the ResNet that it quantizes, 2/2 beside the pre-activation one. Prints one JSON object per network.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.options import at_least, command
from benchmarks.throughput import device_in_use
from pipelines.batch import Batch
from rsnet.config.model_config import Mode, ModelConfig
from rsnet.config.resolve import resolve
from rsnet.config.train_config import TrainConfig
from rsnet.distributed.device import has_bf16
from rsnet.models.autocast import AMP_DTYPES
from rsnet.models.factory import create_model
from rsnet.profiler import step_profiler as profile
from rsnet.training.trainer import make_trainer

CLASSES = 1000
# name: (mode, bits of weights and activations, name of what it is compared with)
KINDS: dict[str, tuple[Mode, int, int, str]] = {
    "resnet 32/32": ("resnet", 32, 32, ""),
    "resnet 2/32": ("resnet", 2, 32, "resnet 32/32"),
    "preact 32/32": ("preact", 32, 32, ""),
    "preact 2/2": ("preact", 2, 2, "preact 32/32"),
}


@dataclass(frozen=True)
class Options:
    arch: tuple[str, ...] = ("parallel_resnet18",)
    """ResNets."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Input sizes."""

    batch_size: int = 16
    """Images a step."""

    rounds: int = at_least(2, 6)
    """Steps of each; the first is not counted."""


def measure(arch: str, o: Options) -> dict[str, Any]:
    """Images/s and ratios of one network."""
    device = device_in_use()
    steps = {kind: make_step(arch, kind, o, device) for kind in KINDS}
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for i in range(o.rounds):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            profile.synchronize(device)
            if i > 0:
                taken[kind].append(time.perf_counter() - start)
    medians = {kind: statistics.median(seconds) for kind, seconds in taken.items()}
    return {
        "arch": arch,
        "images_per_s": {kind: round(o.batch_size / s, 2) for kind, s in medians.items()},
        "seconds_from_to": {k: [round(min(s), 3), round(max(s), 3)] for k, s in taken.items()},
        "times_full_precision": {
            kind: round(medians[kind] / medians[base], 3)
            for kind, (_, _, _, base) in KINDS.items()
            if base
        },
    }


def make_step(arch: str, kind: str, o: Options, device: torch.device) -> Callable[[], None]:
    """A call is an update on noise, with what this trainer does by default on the device."""
    mode, qw, qa, _ = KINDS[kind]
    config = TrainConfig(
        data=".", arch=arch, sizes=o.sizes, batch_size=o.batch_size, mode=mode, qw=qw, qa=qa
    )
    resolved = resolve(
        config,
        world_size=1,
        device_type="cuda" if device.type == "cuda" else "cpu",
        has_bf16=has_bf16(device),
    )
    torch.manual_seed(0)
    model = create_model(ModelConfig(arch, CLASSES, o.sizes, mode=mode, qw=qw, qa=qa)).to(device)
    model = model.to(memory_format=torch.channels_last)
    trainer = make_trainer(resolved, model, CLASSES, 1000, device)
    trainer.objective.train()
    images = tuple(
        torch.randn(o.batch_size, 3, s, s, device=device, dtype=AMP_DTYPES[resolved.amp]).to(
            memory_format=torch.channels_last
        )
        for s in o.sizes
    )
    batch = Batch(images, torch.randint(0, CLASSES, (o.batch_size,), device=device))

    def step() -> None:
        trainer.forward_backward(batch, last=True)
        trainer.update()

    return step


def run(options: Options) -> int:
    for name in options.arch:
        print(json.dumps(measure(name, options), indent=1), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command("quantized", Options, run))

"""What a training step costs beside two other ways to write it: time, memory, the loss.

    python -m benchmarks.throughput --arch parallel_resnet18 parallel_mobilenetv2
    python -m benchmarks.throughput --arch parallel_resnet18 --data /imagenet

"plain" is the original code's way of working, `benchmarks.plain`. "modern" is what a competent user writes
today in some 40 lines, `benchmarks.modern`, in the precision of "ours", which is this trainer with its
defaults for the device. They alternate, step by step, in one run; the ratio of their times in the same
round is the figure to trust. Memory is each one's, in a process of its own. With --data also: "ours" fed by
DALI, beside the slower of its loader alone and its computation alone. Prints one JSON object per network.
The loaders have a script of their own, `benchmarks.loaders`.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.modern import ModernStep
from benchmarks.options import at_least, command, note
from benchmarks.plain import PlainStep
from pipelines import dali
from pipelines.batch import Batch, LoaderSpec
from pipelines.sources.splits import open_splits
from pipelines.utils.errors import UsageError
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import ResolvedConfig, resolve
from rsnet.config.train_config import TrainConfig
from rsnet.distributed.device import has_bf16, keep_freed_memory, time_convolutions
from rsnet.models.activation_checkpointing import convert_to_checkpointed
from rsnet.models.autocast import AMP_DTYPES
from rsnet.models.factory import create_model
from rsnet.models.shapes import gmacs
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.profiler import step_profiler as profile
from rsnet.profiler.report import images_per_s
from rsnet.training.trainer import Trainer, make_trainer

Amp = Literal["auto", "bf16", "off"]
CLASSES = 1000
LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4


@dataclass(frozen=True)
class Options:
    arch: tuple[str, ...] = ("parallel_resnet18", "parallel_resnet50", "parallel_mobilenetv2")
    """ResNets and MobileNetV2."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Input sizes."""

    batch_size: int = 32
    """Images a step; 32 is the trainer's default on a CPU."""

    amp: Amp = "auto"
    """Precision of modern and ours; auto: the trainer's default for the device."""

    rounds: int = at_least(2, 6)
    """Steps of each; the first is not counted."""

    cpu_time: bool = False
    """Time of this process on the CPU in place of the clock's: for a CPU that others use, with one thread."""

    curve: int = at_least(0, 0)
    """Steps over which the losses are compared, on four batches in turn."""

    recompute: Literal["off", "norm", "blocks"] = "off"
    """Of ours."""

    data: Path | None = None
    """Folder with train/ and val/, for the loader and the whole."""

    workers: int = 2
    """DALI's threads."""


def measure(arch: str, o: Options) -> dict[str, Any]:
    """Return all figures of one network."""
    found: dict[str, Any] = {"arch": arch, "step": compare_steps(arch, o)}
    note(f"{arch}, step", found["step"])
    gc.collect()
    torch.cuda.empty_cache()  # else it is not there for the processes that measure memory
    found["peak_memory_mb"] = {
        which: in_new_process(peak_memory_mb, which, arch, o) for which in SIDES
    }
    note(f"{arch}, peak memory", found["peak_memory_mb"])
    if o.curve:
        found["loss"] = compare_losses(arch, o)
    if o.data:
        found["end_to_end"] = end_to_end(arch, o)
    return found


def compare_steps(arch: str, o: Options) -> dict[str, Any]:
    """Return the seconds per step of each way, measured alternately."""
    now = time.process_time if o.cpu_time else time.perf_counter
    steps = {which: make_step(which, arch, o) for which in SIDES}
    batch = make_batches(o, 1)[0]
    taken: dict[str, list[float]] = {which: [] for which in SIDES}
    for i in range(o.rounds):
        for which, step in steps.items():
            start = now()
            step(batch)
            profile.synchronize(batch.labels.device)
            if i > 0:
                taken[which].append(now() - start)
    medians = {which: statistics.median(seconds) for which, seconds in taken.items()}
    return {
        "images_per_s": {which: round(o.batch_size / s, 2) for which, s in medians.items()},
        "seconds_from_to": {w: [round(min(s), 3), round(max(s), 3)] for w, s in taken.items()},
        "speed_over": {w: ratios(taken[w], taken["ours"]) for w in SIDES if w != "ours"},
    }


def ratios(beside: list[float], ours: list[float]) -> dict[str, float]:
    """How many times as fast ours is, round by round: the median, the smallest and the largest."""
    each = [b / a for b, a in zip(beside, ours, strict=True)]
    found = {"median": statistics.median(each), "from": min(each), "to": max(each)}
    return {name: round(ratio, 2) for name, ratio in found.items()}


def compare_losses(arch: str, o: Options) -> dict[str, Any]:
    """How far the others' losses, ours also in float32, are from plain's, relative to them."""
    batches = make_batches(o, 4)
    curves = {}
    for which in (*SIDES, "ours in float32"):
        step = make_step(which, arch, o)
        curves[which] = [step(batches[i % len(batches)]) for i in range(o.curve)]
    plain = curves.pop("plain")
    off = {
        which: [abs(x - y) / y for x, y in zip(curve, plain, strict=True)]
        for which, curve in curves.items()
    }
    return {
        "first_and_last": {w: [round(c[0], 4), round(c[-1], 4)] for w, c in curves.items()}
        | {"plain": [round(plain[0], 4), round(plain[-1], 4)]},
        "mean_difference": {which: round(statistics.mean(d), 5) for which, d in off.items()},
        "largest_difference": {which: round(max(d), 5) for which, d in off.items()},
    }


def peak_memory_mb(which: str, arch: str, o: Options) -> float:
    """Of a step, with weights and momentum, without batch and libraries. On a CPU of the whole process."""
    batch = make_batches(o, 1)[0]
    device = batch.labels.device
    before = _memory_mb(device)
    step = make_step(which, arch, o)
    for _ in range(3):
        step(batch)
    return round(_memory_mb(device) - before)


def end_to_end(arch: str, o: Options) -> dict[str, Any]:
    """Images/s of ours: loader alone, computation alone, both; the last as a share of the slower one."""
    config, device = _config(arch, o, o.amp), device_in_use()
    spec = LoaderSpec(
        config.data, o.sizes, o.batch_size, device, AMP_DTYPES[config.amp] or torch.float32
    )
    loader = dali.make_loaders(dali.DaliOptions(workers=o.workers), spec).train
    assert loader is not None
    trainer, model = make_ours(arch, o, o.amp)
    cost = sum(gmacs(model, size) for size in o.sizes)
    rounds = [profile.profile(trainer, model, loader, cost, o.rounds) for _ in range(3)]
    loader.close()
    speeds = [images_per_s(p) for p in rounds]
    found = {name: statistics.median(s[name] for s in speeds) for name in speeds[0]}
    share = found["end_to_end"] / min(found["loader"], found["compute"])
    return {name: round(speed, 2) for name, speed in found.items()} | {"share": round(share, 3)}


def make_step(which: str, arch: str, o: Options) -> Callable[[Batch], float]:
    """One of them, from the same weights; a call is an update, and returns its loss."""
    if which == "plain":
        return plain_step(make_network(arch).to(device_in_use()), o)
    if which == "modern":
        amp = AMP_DTYPES[_config(arch, o, o.amp).amp]
        network = make_network(arch).to(device_in_use()).to(memory_format=torch.channels_last)
        return modern_step(network, o, amp)
    trainer, _ = make_ours(arch, o, "off" if which == "ours in float32" else o.amp)
    return our_step(trainer)


def plain_step(network: nn.Module, o: Options) -> Callable[[Batch], float]:
    plain = PlainStep(network, len(o.sizes), LR, MOMENTUM, DECAY)
    return lambda batch: plain(batch.images, batch.labels)


def modern_step(
    network: nn.Module, o: Options, dtype: torch.dtype | None
) -> Callable[[Batch], float]:
    modern = ModernStep(network, o.sizes, dtype, LR, MOMENTUM, DECAY)
    return lambda batch: modern(batch.images, batch.labels).item()


def our_step(trainer: Trainer) -> Callable[[Batch], float]:
    trainer.objective.train()
    dtype = trainer.amp or torch.float32

    def step(batch: Batch) -> float:
        images = tuple(x.to(dtype, memory_format=torch.channels_last) for x in batch.images)
        terms = trainer.forward_backward(Batch(images, batch.labels), last=True)
        trainer.update()
        return terms["total"].item()

    return step


SIDES = ("plain", "modern", "ours")


def require_known(archs: Sequence[str]) -> None:
    """Raise UsageError for the first that `make_network` does not make."""
    known = torchvision.models.list_models(torchvision.models)
    for arch in archs:
        name = library_name(arch)
        if not (name in known and re.match(r"(wide_)?res(net|next)|mobilenet_v2", name)):
            raise UsageError(f"--arch {arch}: it takes torchvision's ResNets and MobileNetV2")


def library_name(arch: str) -> str:
    """Return torchvision's name of a network."""
    bare = arch.removeprefix("parallel_")
    return "mobilenet_v2" if bare == "mobilenetv2" else bare


def make_network(arch: str) -> nn.Module:
    """torchvision's, initialised alike every time."""
    torch.manual_seed(0)
    name = library_name(arch)
    options = {"dropout": 0.0} if name == "mobilenet_v2" else {}
    network: nn.Module = torchvision.models.get_model(name, num_classes=CLASSES, **options)
    return network


def make_batches(o: Options, count: int) -> list[Batch]:
    """Return batches of noise, with labels that can be memorised."""
    generator = torch.Generator().manual_seed(1)

    def noise(size: int) -> Tensor:
        return torch.randn(o.batch_size, 3, size, size, generator=generator).to(device_in_use())

    labels = [
        torch.randint(0, CLASSES, (o.batch_size,), generator=generator).to(device_in_use())
        for _ in range(count)
    ]
    return [Batch(tuple(map(noise, o.sizes)), y) for y in labels]


def make_ours(arch: str, o: Options, amp: Amp) -> tuple[Trainer, Any]:
    model = make_model(arch, o)
    return trainer_of(model, arch, o, amp), model


def trainer_of(model: ResolutionSwitchable, arch: str, o: Options, amp: Amp) -> Trainer:
    return make_trainer(_config(arch, o, amp), model, CLASSES, 1000, device_in_use())


def make_model(arch: str, o: Options) -> ResolutionSwitchable:
    """With the weights of `make_network`."""
    model = create_model(ModelConfig(arch, CLASSES, o.sizes))
    weights = make_network(arch).state_dict()
    own = model.network.state_dict()
    model.network.load_state_dict({k: weights[re.sub(r"\.by_resolution\.\d+", "", k)] for k in own})
    if o.recompute != "off":
        convert_to_checkpointed(model.network, o.recompute)
    return model.to(device_in_use()).to(memory_format=torch.channels_last)


def _config(arch: str, o: Options, amp: Amp) -> ResolvedConfig:
    config = TrainConfig(
        data=str(o.data or "."), arch=arch, sizes=o.sizes, batch_size=o.batch_size, lr=LR, momentum=MOMENTUM,
        weight_decay=DECAY, amp=None if amp == "auto" else amp, epochs=100,
    )  # fmt: skip
    kind = "cuda" if device_in_use().type == "cuda" else "cpu"
    return resolve(config, world_size=1, device_type=kind, has_bf16=has_bf16(device_in_use()))  # type: ignore[arg-type]


def device_in_use() -> torch.device:
    """The device, set up for all that is compared on it as a training sets it up."""
    time_convolutions()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)
    return device


def _memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status").read_text()
    return float(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1e3


def in_new_process(function: Callable[..., float], *arguments: Any) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def run(o: Options) -> int:
    require_known(o.arch)
    if o.data is not None:
        open_splits(o.data)  # what is wrong with it is found before minutes of work
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
    sys.exit(command("throughput", Options, run))

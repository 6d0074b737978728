"""The header of a run: changed options, network, data, device, and where the run is written."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from pipelines.batch import Loader
from rsnet.config.size_schedule import mean_cost
from rsnet.distributed import process_group as distributed
from rsnet.loggers.run_context import RunContext
from rsnet.losses import ENSEMBLE
from rsnet.models.teacher import Teacher

PRECISION = {"bf16": "bfloat16", "fp16": "float16", "off": "float32"}


def say_header(context: RunContext, steps_per_epoch: int | None = None) -> None:
    """Print a few aligned lines about a run; the full command is in its command.txt.

    steps_per_epoch: of a training, which has a global batch and a run directory.
    """
    if not distributed.is_main():
        return
    config = context.config
    lines = {
        "options": context.changed_options() or f"those of --recipe {config.recipe}",
        "network": _network(context),
        "data": _data(context),
        "device": f"{_device(context.device)}, {PRECISION[config.amp]}",
    }
    if context.teacher is not None:
        lines["teacher"] = _teacher(context.teacher, context)
    if config.train_sizes != config.sizes and not config.evaluate:
        lines["sizes"] = (
            f"{_pixels(config.train_sizes)} in training, {_pixels(config.sizes)} in evaluation"
        )
    if not config.has_all_sizes and not config.evaluate:
        lines["steps"] = _steps(context)
    if steps_per_epoch is not None:
        lines["global batch"] = (
            f"{context.global_batch} = {config.batch_size} images x {distributed.world_size()} processes x "
            f"{config.accumulate} accumulated; {steps_per_epoch} steps an epoch"
        )
        uploaded = f", uploaded to {config.url}" if config.url else ""
        lines["run"] = f"{config.folder}{uploaded}"
    for name, value in lines.items():
        context.console.say(f"{name:12}  {value}")
    if steps_per_epoch is not None:
        warn_of_schedule(context)


def _network(context: RunContext) -> str:
    shared, private = context.model.count_parameters()
    costs = context.cost.items()
    gmacs = ", ".join(f"{cost:.3g} at {name}" for name, cost in costs if name != ENSEMBLE)
    return (
        f"{context.config.arch}: {_short(shared + private)} parameters, {_short(private)} of them private to "
        f"sizes; GMACs {gmacs}"
    )


def _teacher(teacher: Teacher, context: RunContext) -> str:
    config = context.config
    trained = mean_cost(context.training_cost, config.phases, config.sizes_per_step, config.epochs)
    sizes = " ".join(map(str, teacher.sizes))
    # A backward is twice a forward; it has none.
    return (
        f"at {sizes}: GMACs {teacher.gmacs:.3g}, {100 * teacher.gmacs / (3 * trained):.0f} % of a step's "
        f"without it; weights {teacher.megabytes:.3g} MB"
    )


def _steps(context: RunContext) -> str:
    """Return which sizes steps train, and what a training costs of one whose steps have all sizes."""
    config, k = context.config, context.config.sizes_per_step
    parts = []
    for _, sizes in config.phases:
        drawn = f"{sizes[0]} and {k - 1} of " if k < len(sizes) else ""
        parts.append(drawn + _pixels(sizes[1:] if drawn else sizes))
    ends = [phase.start for phase in config.phases[1:]]
    until = [f"{part} up to epoch {end}" for part, end in zip(parts, ends, strict=False)]
    shown = ", ".join([*until, f"then {parts[-1]}" if until else parts[-1]])
    costs = context.training_cost
    share = 100 * mean_cost(costs, config.phases, k, config.epochs) / sum(costs.values())
    return f"train {shown}; {share:.0f} % of the operations of all sizes in each step"


def _pixels(sizes: Sequence[int]) -> str:
    return " ".join(map(str, sizes))


def _short(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} k"


def _data(context: RunContext) -> str:
    train, val, classes = context.loaders
    counts = f"{_images(val)} to validate on, {len(classes)} classes"
    if train is not None:
        counts = f"{_images(train)} images to train on, {counts}"
        order = train.state_dict()["order"]
        if order != "random":
            counts += f"; order {order}"
    return f"{context.config.data}: {counts}"


def _images(loader: Loader) -> int:
    return int(loader.state_dict()["samples"])


def _device(device: torch.device) -> str:
    world = distributed.world_size()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU with {len(os.sched_getaffinity(0))} cores"
    return f"{world} x {name}" if world > 1 else name


def warn_of_schedule(context: RunContext) -> None:
    """Warn about learning-rate settings that are probably mistakes."""
    config = context.config
    if config.warmup >= config.epochs:
        last = config.lr * config.epochs / config.warmup
        context.console.say(
            f"note: the learning rate only rises, to {last:g} of {config.lr:g}: --warmup {config.warmup} is "
            f"not below --epochs {config.epochs}"
        )
    if config.layer_decay < 1 and config.pretrained is None and config.resume is None:
        context.console.say(
            f"note: --layer-decay {config.layer_decay:g} without --pretrained: the first layers, which have "
            "everything to learn, learn the least"
        )
    if config.never_decays:
        context.console.say(
            f"note: the learning rate stays at {config.lr:g}: --epochs {config.epochs} end before "
            f"--schedule's first, {min(config.schedule)}"
        )

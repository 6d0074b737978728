"""`--profile`: measure one configuration, print what it means, leave figures, a plot and a trace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity

from pipelines.batch import Loader, Loaders
from rsnet import distributed, profile_report
from rsnet.assemble import make_trainer
from rsnet.config import as_plain
from rsnet.engine import Trainer
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.models.zoo import gflops
from rsnet.profile import Profile, endless, profile
from rsnet.resolve import ResolvedConfig
from rsnet.runlog import Display, environment
from rsnet.wandb_log import WandbLog

TRACED_STEPS = 3
TRACE = "trace.json.gz"  # a tenth of the bytes, which W&B's time for uploads is too short for


def profile_and_tell(
    config: ResolvedConfig,
    options: Any,
    model: ResolutionSwitchable,
    loaders: Loaders,
    device: torch.device,
    num_classes: int,
    display: Display,
) -> Profile:
    """Measure, print the table and the bottleneck, and write profile.json, .png and trace.json."""
    assert loaders.train is not None
    steps_per_epoch = max(1, len(loaders.train) // config.accumulate)
    trainer = make_trainer(config, model, num_classes, steps_per_epoch, device)
    cost = sum(gflops(model, size) for size in model.sizes)
    display.say(
        f"{config.profile_steps} steps each of loader, computation, and both; {device}, amp {config.amp}"
    )
    found = profile(trainer, model, loaders.train, cost, config.profile_steps)
    display.say(profile_report.table(found))
    display.say(profile_report.advice(found, config, options))
    folder = config.output / "profile"
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        figures = {
            **profile_report.as_json(found),
            "environment": environment(device, distributed.world_size()),
        }
        (folder / "profile.json").write_text(json.dumps(figures, indent=2) + "\n")
        _plot(found, folder / "profile.png")
    _trace(trainer, loaders.train, device, folder / TRACE)
    display.say(f"{folder}: profile.json, profile.png, {TRACE} (for https://ui.perfetto.dev)")
    return found


def log_to_wandb(
    config: ResolvedConfig, options: Any, figures: Mapping[str, Any], display: Display
) -> None:
    """In a W&B run of its own: the one that the run directory names is a training's."""
    folder = config.output / "profile"
    batch = {"global_batch": config.global_batch(distributed.world_size())}
    log = WandbLog(
        config.wandb if distributed.is_main() else "disabled",
        folder,
        config.wandb_project,
        f"{config.wandb_name or config.output.name} profile",
        as_plain(config) | as_plain(options) | batch,
        None,
        display.say,
        remedy=f"all of it is in {folder}",
    )
    log.log_profile(figures, folder / "profile.png", [folder / "profile.json", folder / TRACE])
    log.finish()


def _trace(trainer: Trainer, loader: Loader, device: torch.device, path: Path) -> None:
    """What PyTorch's profiler saw of a few steps."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=kinds) as profiler:
        for batch in islice(endless(loader), TRACED_STEPS):
            trainer.forward_backward(batch, last=True)
            trainer.update()
    if distributed.is_main():
        profiler.export_chrome_trace(str(path))


def _plot(p: Profile, path: Path) -> None:
    """The parts of a step, of the computation alone and of both, beside the loader."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    rows = {
        "together": p.end_to_end.parts,
        "computation": p.compute.parts,
        "loader": {"data": p.loader.mean},
    }
    left = dict.fromkeys(rows, 0.0)
    for part in p.end_to_end.parts:
        widths = [parts.get(part, 0.0) for parts in rows.values()]
        axes.barh(list(rows), widths, left=list(left.values()), label=part)
        left = {name: left[name] + width for name, width in zip(rows, widths, strict=True)}
    axes.set(xlabel="ms a step")
    axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)

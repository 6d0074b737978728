"""`--profile`: measure a configuration, print what it means, leave figures, a plot and a trace; and sweep."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity

from pipelines.batch import Loader, Loaders
from pipelines.utils.atomic_io import atomic_write_json
from pipelines.utils.library_output import keep_library_output
from rsnet.config.command_line import as_command
from rsnet.config.resolve import ResolvedConfig
from rsnet.config.size_schedule import WITHOUT, step_cost
from rsnet.distributed import process_group as distributed
from rsnet.loggers.header import say_header
from rsnet.loggers.run_context import RunContext
from rsnet.loggers.run_dir import environment
from rsnet.loggers.run_logger import start_wandb
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.profiler import report as profile_report
from rsnet.profiler.step_profiler import Profile, endless, profile
from rsnet.profiler.sweep import Sweep, Trial, as_json, other_recipe
from rsnet.training.trainer import Trainer, make_trainer

OWN = ("profile", "profile_steps", "profile_sweep", "profile_limit")  # not of a training
TRACED_STEPS = 3
TRACE = "trace.json.gz"  # W&B's time for uploads is too short for ten times the bytes


class ProfileRun:
    """Measurements of one configuration, and of others in a sweep; figures go to --output/profile."""

    def __init__(self, context: RunContext) -> None:
        self.context, self.config, self.say = context, context.config, context.console.say
        self.folder = self.config.folder / "profile"
        config = self.config
        self.cost = step_cost(context.training_cost, config.sizes, config.sizes_per_step)

    def run(
        self,
        swept: list[str],
        again: Callable[..., ResolvedConfig],
        open_loaders: Callable[[ResolvedConfig, Any], Loaders],
    ) -> None:
        """Profile, sweep over the options of these names, and tell W&B.

        again: the configuration with other batches. open_loaders: those of other options.
        """
        say_header(self.context)
        if len(self.config.phases) > 1:
            self.say("--size-schedule: measured are the last part's steps, of all sizes")
        found = self.profile()
        figures = profile_report.figures(found)
        files = ["profile.json", TRACE]
        if swept:
            given = Trial("", None, self.config, self.context.options, found)
            measure = partial(self._measure, open_loaders)
            sweep = Sweep(given, again, measure, self.say)
            self._sweep(sweep, swept)
            figures["profile/images_per_s/best"] = sweep.best.speed
            files.append("sweep.json")
        self._log_to_wandb(figures, files)

    def profile(self) -> Profile:
        """Measure, print the table and the bottleneck, and write profile.json, .png and the trace."""
        config, device, say = self.config, self.context.device, self.say
        model = self.context.model
        trainer, loader = self._trainer(config, model, self.context.loaders)
        say(f"{config.profile_steps} steps each of loader, computation, and both")
        found = profile(trainer, model, loader, self.cost, config.profile_steps)
        self.context.console.say_table(profile_report.table(found))
        self.context.console.say_table(profile_report.advice(found, config, self.context.options))
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            keep_library_output(self.folder / "libraries.log")
            figures = {
                **profile_report.as_json(found),
                "order": loader.state_dict()["order"],
                "environment": environment(device, distributed.world_size()),
            }
            atomic_write_json(self.folder / "profile.json", figures)
            _plot(found, self.folder / "profile.png")
        _trace(trainer, loader, device, self.folder / TRACE)
        say(f"{self.folder}: profile.json, profile.png, {TRACE} (for https://ui.perfetto.dev)")
        return found

    def _sweep(self, sweep: Sweep, names: list[str]) -> None:
        """Try values; print the fastest command and write sweep.json, also of a sweep that is interrupted."""
        say, device = self.say, self.context.device
        if "decoder-hw-load" in names and device.type != "cuda":
            say("--decoder-hw-load: not tried, it is of a GPU's JPEG engine")
            names = [name for name in names if name != "decoder-hw-load"]
        cores = len(os.sched_getaffinity(0))
        try:
            sweep.run(names, device.type, cores, self.config.profile_limit)
        finally:
            self._report(sweep)

    def _report(self, sweep: Sweep) -> None:
        config, say = self.config, self.say
        if sweep.not_tried:
            untried = ", ".join(sweep.not_tried)
            say(f"not tried, because --profile-limit {config.profile_limit:g} is over: {untried}")
        best = sweep.best
        command = as_command(self.context.script, best.config, best.options, without=OWN)
        atomic_write_json(self.folder / "sweep.json", as_json(sweep, command))
        if best is sweep.given:
            say("nothing was faster than the command as given:")
        else:
            say(f"best, {best.speed / sweep.given.speed:.2f} times as many images/s as given:")
        say(command)
        if note := other_recipe(config, best.config):
            say(note)

    def _measure(
        self,
        open_loaders: Callable[[ResolvedConfig, Any], Loaders],
        config: ResolvedConfig,
        options: Any,
        deadline: float,
    ) -> Profile:
        """Profile other options, with loaders and weights of their own, which are gone afterwards."""
        self._release()
        loaders = open_loaders(config, options)
        try:
            model = copy.deepcopy(self.context.model)
            trainer, loader = self._trainer(config, model, loaders)
            return profile(trainer, model, loader, self.cost, config.profile_steps, deadline)
        finally:
            loaders.close()

    def _release(self) -> None:
        """Free the memory of the measurement before, whose objects may hold each other."""
        self.context.loaders.close()
        gc.collect()
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()

    def _trainer(
        self, config: ResolvedConfig, model: ResolutionSwitchable, loaders: Loaders
    ) -> tuple[Trainer, Loader]:
        assert loaders.train is not None
        # Of the last steps, which are the dearest: they have all sizes.
        config = dataclasses.replace(config, size_schedule=WITHOUT)
        steps_per_epoch = max(1, len(loaders.train) // config.accumulate)
        classes, device = self.context.network.num_classes, self.context.device
        trainer = make_trainer(
            config, model, classes, steps_per_epoch, device, self.say, teacher=self.context.teacher
        )
        return trainer, loaders.train

    def _log_to_wandb(self, figures: dict[str, float], files: list[str]) -> None:
        """Log to a W&B run of its own: the one that the run directory names is a training's."""
        log = start_wandb(
            self.context,
            self.folder,
            name=f"{self.config.wandb_name or self.config.folder.name} profile",
            remedy=f"all of it is in {self.folder}",
        )
        paths = [self.folder / name for name in files]
        log.log_profile(figures, self.folder / "profile.png", paths)
        log.finish()


def _trace(trainer: Trainer, loader: Loader, device: torch.device, path: Path) -> None:
    """Write a Chrome trace of a few steps by PyTorch's profiler."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    # acc_events: without it, torch 2.11 warns that only the last of several cycles is kept.
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        for batch in islice(endless(loader), TRACED_STEPS):
            trainer.forward_backward(batch, last=True)
            trainer.update()
    if distributed.is_main():
        profiler.export_chrome_trace(str(path))


def _plot(p: Profile, path: Path) -> None:
    """Plot the parts of a step, of the computation alone and of both, beside the loader."""
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

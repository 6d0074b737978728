"""Logs a run to its directory, the console, TensorBoard and Weights & Biases."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsnet.config.size_schedule import sizes_in
from rsnet.distributed import process_group as distributed
from rsnet.distributed.device import peak_memory_gb
from rsnet.evaluation import report
from rsnet.evaluation.curves import plot_curves, read_metrics
from rsnet.evaluation.report import Results
from rsnet.loggers.header import say_header
from rsnet.loggers.run_context import RunContext
from rsnet.loggers.run_dir import COMMANDS, TYPED, RunDir, environment
from rsnet.loggers.tensorboard_logger import TensorBoardLogger
from rsnet.loggers.wandb_logger import WandbLogger

# What a loss is called, by its name in `rsnet.losses.loss_terms`.
KINDS = {"ce": "cross-entropy", "bce": "binary cross-entropy"}


@dataclass(frozen=True)
class TrainingProgress:
    """Training metrics averaged since the last report. Times in seconds a step, of this process."""

    step: int
    steps_in_epoch: int  # done in this epoch
    lr: float
    terms: dict[str, float]
    images_per_s: float  # of this process
    data_time: float  # waiting for the loader
    step_time: float
    skipped: int  # updates so far that were left out, see `FiniteGuard`


class RunLogger:
    """Header, steps, evaluations and results of one run. Silent on ranks that are not the first.

    wandb_id: the W&B run to continue, or None.
    """

    def __init__(
        self, context: RunContext, run_dir: RunDir, steps_per_epoch: int, wandb_id: str | None
    ) -> None:
        self.run_dir, self.console = run_dir, context.console
        self.config, self.device = context.config, context.device
        self.steps_per_epoch = steps_per_epoch
        self.images = context.global_batch
        # An evaluation takes as long as so many updates. Until there was one: a forward of all images, which
        # is a third of a training step's work.
        self._evaluation = len(context.loaders.val) / self.config.accumulate / 3
        self._update_s = self._ended = (
            0.0  # seconds: of an update; when the epoch's last one was done
        )
        self._losses = ""
        self._sizes: tuple[int, ...] = ()  # of this epoch's steps
        self._write_header(context)
        self.tensorboard = TensorBoardLogger(
            run_dir.path, self.config.tensorboard and distributed.is_main(), self.console.say
        )
        self.wandb = start_wandb(context, self.config.folder, run_id=wandb_id)

    def _write_header(self, context: RunContext) -> None:
        """Write down and say what runs where."""
        self.run_dir.append_text(COMMANDS, f"{TYPED}{context.typed}\n{context.command()}\n")
        self.run_dir.set_aside("results.json")  # with fewer epochs
        self.run_dir.write_json("config.json", context.to_plain_dict())
        self.run_dir.write_json("env.json", environment(self.device, distributed.world_size()))
        say_header(context, self.steps_per_epoch)

    def close(self, failed: bool) -> None:
        """End the bar, TensorBoard's file and the W&B run."""
        self.console.stop()
        self.tensorboard.close()
        self.wandb.finish(failed)

    def begin_epoch(self, epoch: int, done: int) -> None:
        """Begin the bar of an epoch, after so many epochs and so many updates of this one."""
        epochs, interval = self.config.epochs, self.config.val_interval
        sizes = sizes_in(self.config.phases, epoch)
        if sizes != self._sizes and self._sizes:
            self.console.say(f"epoch {epoch + 1}/{epochs}: steps train {' '.join(map(str, sizes))}")
        self._sizes = sizes
        evaluations = -(-epochs // interval) - epoch // interval
        later = (epochs - epoch - 1) * self.steps_per_epoch + evaluations * self._evaluation
        self.console.start(
            f"epoch {epoch + 1}/{epochs}",
            self.steps_per_epoch,
            images=self.images,
            done=done,
            later=later,
        )

    def log_update(self, done: int) -> None:
        """Move the bar to an update that was queued; the losses beside it are those of the last report."""
        self.console.update(done, self._losses)

    def end_epoch(self) -> None:
        """End the bar of an epoch; what follows is its evaluation."""
        self.console.stop()
        self._ended = time.perf_counter()

    def log_progress(self, p: TrainingProgress, epoch: int, alpha: Mapping[int, float]) -> None:
        """Log the updates since the last call. `epoch`: those that are finished."""
        speed = p.images_per_s * distributed.world_size()
        metrics = {
            "step": p.step,
            "epoch": epoch + p.steps_in_epoch / self.steps_per_epoch,
            "lr": p.lr,
            **{f"train/{name}": value for name, value in p.terms.items()},
            **{f"alpha/{size}": a for size, a in alpha.items()},
            "perf/images_per_s": speed,
            "perf/data_time": p.data_time,
            "perf/step_time": p.step_time,
            "perf/gpu_mem_gb": peak_memory_gb(self.device) or 0.0,
        }
        if p.skipped:
            metrics["skipped_updates"] = p.skipped
        self._log(metrics)
        self._update_s, self._losses = p.step_time, losses_in_words(p)
        self.console.update(p.steps_in_epoch, self._losses, prints=True)

    def log_evaluation(self, results: Results, epoch: int, step: int) -> None:
        """Log an evaluation after so many epochs and updates."""
        if self._update_s:
            self._evaluation = (time.perf_counter() - self._ended) / self._update_s
        metrics: dict[str, Any] = {"step": step, "epoch": epoch}
        for name, values in results.items():
            metrics |= {f"val/{what}@{name}": value for what, value in values.items()}
        self._log(metrics)
        top1 = "  ".join(f"{name} {r['top1']:.2f}" for name, r in results.items())
        self.console.say(f"epoch {epoch}/{self.config.epochs}  top-1 %: {top1}")

    def _log(self, metrics: Mapping[str, Any]) -> None:
        line = self.run_dir.append_metrics(metrics)
        self.tensorboard.log(line)
        self.wandb.log(metrics)

    def log_results(
        self, results: Results, cost: Mapping[str, float], shared: int, private: int
    ) -> None:
        """Log the last evaluation as a table, a file and a plot, with GMACs and numbers of parameters."""
        if not distributed.is_main():
            return
        self.console.say_table(report.table(results, cost))
        plot = self.config.folder / "accuracy_gmacs.png"
        report.plot(plot, self.config.arch, results, cost)
        curves, metrics = self.config.folder / "curves.png", self.run_dir.path / "metrics.jsonl"
        plot_curves(curves, self.config.arch, read_metrics(metrics))
        self.run_dir.write_json(
            "results.json",
            {"gmacs": cost, "parameters": {"shared": shared, "private": private}, **results},
        )
        self.wandb.log_results(report.COLUMNS, report.rows(results, cost), plot)
        self.console.say(f"run directory {self.config.folder}, plots {plot.name} and {curves.name}")


def losses_in_words(p: TrainingProgress) -> str:
    """Return the (binary) cross-entropy at the largest and the smallest size, and the learning rate.

    The total loss is left out because its value has no intuitive scale.
    """
    named = [(*name.partition("/")[::2], value) for name, value in p.terms.items()]
    kind = next(KINDS[loss] for loss, _, _ in named if loss in KINDS)
    of_sizes = {int(size): v for loss, size, v in named if loss in KINDS and size.isdigit()}
    ends = dict.fromkeys((max(of_sizes), min(of_sizes)))  # one, of one size
    values = ", ".join(f"{of_sizes[size]:.3f} at {size}" for size in ends)
    skipped = f"{p.skipped} updates skipped" if p.skipped else ""
    return ", ".join(filter(None, [f"{kind} {values}", f"lr {p.lr:.4g}", skipped]))


def start_wandb(
    context: RunContext,
    directory: Path,
    *,
    run_id: str | None = None,
    name: str | None = None,
    remedy: str | None = None,
) -> WandbLogger:
    """Start or continue the W&B run of `directory`; the first process alone has one.

    name: of the run, instead of --wandb-name. remedy: see `WandbLogger`.
    """
    c = context.config
    return WandbLogger(
        c.wandb if distributed.is_main() else "disabled",
        directory,
        project=c.wandb_project,
        name=name or c.wandb_name,
        entity=c.wandb_entity,
        tags=c.wandb_tags,
        config=context.to_plain_dict() | {"global_batch": context.global_batch},
        run_id=run_id,
        say=context.console.say,
        remedy=remedy,
    )

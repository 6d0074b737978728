"""What a run tells: its directory, the console and Weights & Biases."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rsnet.config.command_line import as_command
from rsnet.config.resolve import ResolvedConfig
from rsnet.config.train_config import to_plain_dict
from rsnet.distributed import process_group as distributed
from rsnet.evaluation import report
from rsnet.evaluation.report import Results
from rsnet.loggers.console import ConsoleLogger
from rsnet.loggers.run_dir import RunDir, environment
from rsnet.loggers.wandb_logger import WandbLogger


@dataclass(frozen=True)
class TrainingProgress:
    """What the steps since the last report were like. Times in seconds a step, of this process."""

    step: int
    steps_in_epoch: int  # done in this epoch
    lr: float
    terms: dict[str, float]
    images_per_s: float  # of this process
    data_time: float  # waiting for the loader
    step_time: float
    skipped: int  # updates so far that were left out, see `FiniteGuard`


class RunLogger:
    """Header, steps, evaluations and results of one run. Silent on ranks that are not the first."""

    def __init__(
        self,
        config: ResolvedConfig,
        run_dir: RunDir,
        display: ConsoleLogger,
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        self.config, self.run_dir, self.display = config, run_dir, display
        self.steps_per_epoch, self.device = steps_per_epoch, device
        self.global_batch = config.global_batch(distributed.world_size())

    def open(self, script: str, options: Any, wandb_id: str | None) -> None:
        """Write the header and begin, or go on with, the W&B run."""
        c = self.config
        typed = " ".join(sys.argv)
        resolved = as_command(script, c, options)
        world = distributed.world_size()
        self.run_dir.append_text("command.txt", f"# typed: {typed}\n{resolved}\n")
        self.run_dir.write_json("config.json", to_plain_dict(c) | to_plain_dict(options))
        self.run_dir.write_json("env.json", environment(self.device, world))
        self.display.say(
            f"global batch {self.global_batch} = {c.batch_size} images x {world} processes x "
            f"{c.accumulate} accumulated; {self.steps_per_epoch} steps an epoch; {self.device}, amp {c.amp}"
        )
        self.wandb = WandbLogger(
            c.wandb if distributed.is_main() else "disabled",
            c.output,
            c.wandb_project,
            c.wandb_name,
            to_plain_dict(c) | to_plain_dict(options) | {"global_batch": self.global_batch},
            wandb_id,
            self.display.say,
        )

    def close(self, failed: bool) -> None:
        self.display.stop()
        self.wandb.finish(failed)

    def progress(self, p: TrainingProgress, epoch: int, alpha: Mapping[int, float]) -> None:
        """The updates since the last call. `epoch`: those that are finished."""
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
            "perf/gpu_mem_gb": _peak_memory_gb(self.device),
        }
        if p.skipped:
            metrics["skipped_updates"] = p.skipped
        self.run_dir.append_metrics(metrics)
        self.wandb.log(metrics)
        self.display.update(
            p.steps_in_epoch, f"loss {p.terms['total']:.4f}  lr {p.lr:.5f}  {speed:.0f} img/s"
        )

    def evaluation(self, results: Results, epoch: int, step: int) -> None:
        metrics: dict[str, Any] = {"step": step, "epoch": epoch}
        for name, values in results.items():
            metrics |= {f"val/{what}@{name}": value for what, value in values.items()}
        self.run_dir.append_metrics(metrics)
        self.wandb.log(metrics)
        top1 = "  ".join(f"{name} {r['top1']:.2f}" for name, r in results.items())
        self.display.say(f"epoch {epoch}/{self.config.epochs}  top-1 %: {top1}")

    def results(self, results: Results, cost: dict[str, float], shared: int, private: int) -> None:
        """The last evaluation, as a table, a file and a plot; with GFLOPs and numbers of parameters."""
        if not distributed.is_main():
            return
        self.display.say(report.table(results, cost))
        plot = self.config.output / "accuracy_flops.png"
        report.plot(plot, self.config.arch, results, cost)
        self.run_dir.write_json(
            "results.json",
            {"gflops": cost, "parameters": {"shared": shared, "private": private}, **results},
        )
        self.wandb.log_results(report.COLUMNS, report.rows(results, cost), plot)
        self.display.say(f"run directory {self.config.output}, plot {plot}")


def _peak_memory_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0

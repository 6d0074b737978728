"""One training run: epochs, evaluations, checkpoints, logs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from pipelines.batch import Loaders
from pipelines.errors import UsageError, blame
from rsnet import checkpoint, distributed, report
from rsnet.assemble import AMP_DTYPES, make_trainer
from rsnet.cli import as_command
from rsnet.config import as_plain
from rsnet.engine import Progress, evaluate, train_one_epoch
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.models.zoo import gflops
from rsnet.optim import load_momentum
from rsnet.report import Results
from rsnet.resolve import ResolvedConfig
from rsnet.runlog import Display, RunDir, environment
from rsnet.wandb_log import WandbLog


class TrainingRun:
    """One training run: what its steps share."""

    def __init__(
        self,
        script: str,
        config: ResolvedConfig,
        options: Any,
        model: ResolutionSwitchable,
        loaders: Loaders,
        device: torch.device,
        display: Display,
        network: dict[str, Any],
    ) -> None:
        assert loaders.train is not None
        self.script, self.config, self.options = script, config, options
        self.model, self.loaders, self.train_loader = model, loaders, loaders.train
        self.device, self.display, self.network = device, display, network
        self.steps_per_epoch = len(self.train_loader) // config.accumulate
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"--accumulate {config.accumulate}: an epoch has only {len(self.train_loader)} batches"
            )
        self.trainer = make_trainer(
            config, model, network["num_classes"], self.steps_per_epoch, device
        )
        self.cost = cost_of(model)
        self.epoch = 0  # epochs that are finished
        self.best: list[float] = []

    def train(self, source: Path | None, content: dict[str, Any] | None) -> Results:
        """All epochs that are left, each with an evaluation and a checkpoint."""
        config = self.config
        continues = config.resume == "auto" or (
            source is not None
            and content is not None
            and source.parent.parent.resolve() == config.output.resolve()
            and "calibrated" not in content["network"]
        )
        self.run_dir = RunDir(config.output, continues, distributed.is_main())
        if content:
            self._restore(content)
            self._say_what_changed(source, content["config"])
        run_id = None
        if content and continues:
            self.best, run_id = content["best"], content["wandb_id"]
            self.run_dir.rewind(content["step"])
            if not self.best:  # imported: it is the best until an epoch is better
                self.best = self._score(self._evaluate())
        self._write_header()
        self.wandb = WandbLog(
            config.wandb if distributed.is_main() else "disabled",
            config.output,
            config.wandb_project,
            config.wandb_name,
            as_plain(config) | as_plain(self.options) | {"global_batch": self._global_batch()},
            run_id,
            self.display.say,
        )
        failed = True
        try:
            results = self._epochs()
            self._finish(results)
            failed = False
        finally:
            self.display.stop()
            self.wandb.finish(failed)
        return results

    def _epochs(self) -> Results:
        results: Results | None = None
        for epoch in range(self.epoch, self.config.epochs):
            self.train_loader.set_epoch(epoch)
            self.display.start(f"epoch {epoch + 1}/{self.config.epochs}", self.steps_per_epoch)
            train_one_epoch(
                self.trainer, self.train_loader, self.config.log_interval, self._log_progress
            )
            self.display.stop()
            distributed.share_buffers(self.model)
            if self.trainer.ema:
                distributed.share_buffers(self.trainer.ema.model)
            results = self._evaluate()
            self.epoch = epoch + 1
            self._log_results(results)
            self._save(results)
        return results or self._evaluate()

    def _evaluate(self) -> Results:
        return shown_evaluation(
            self._evaluated, self.loaders, self.device, AMP_DTYPES[self.config.amp], self.display
        )

    @property
    def _evaluated(self) -> ResolutionSwitchable:
        """The network, or the average of what it was."""
        return self.trainer.ema.model if self.trainer.ema else self.model

    def _global_batch(self) -> int:
        return self.config.batch_size * distributed.world_size() * self.config.accumulate

    def _write_header(self) -> None:
        typed = " ".join(sys.argv)
        resolved = as_command(self.script, self.config, self.options)
        self.run_dir.append_text("command.txt", f"# typed: {typed}\n{resolved}\n")
        self.run_dir.write_json("config.json", as_plain(self.config) | as_plain(self.options))
        self.run_dir.write_json("env.json", environment(self.device, distributed.world_size()))
        self.display.say(
            f"global batch {self._global_batch()} = {self.config.batch_size} images x "
            f"{distributed.world_size()} processes x {self.config.accumulate} accumulated; "
            f"{self.steps_per_epoch} steps an epoch; {self.device}, amp {self.config.amp}"
        )

    def _log_progress(self, p: Progress) -> None:
        world = distributed.world_size()
        alpha = self.model.ensemble_weights().tolist()
        metrics = {
            "step": p.step,
            "epoch": self.epoch + p.steps_in_epoch / self.steps_per_epoch,
            "lr": p.lr,
            **{f"train/{name}": value for name, value in p.terms.items()},
            **{f"alpha/{s}": a for s, a in zip(self.model.sizes, alpha, strict=True)},
            "perf/images_per_s": p.images_per_s * world,
            "perf/data_time": p.data_time,
            "perf/step_time": p.step_time,
            "perf/gpu_mem_gb": _peak_memory_gb(self.device),
        }
        self.run_dir.append_metrics(metrics)
        self.wandb.log(metrics)
        speed = p.images_per_s * world
        self.display.update(
            p.steps_in_epoch, f"loss {p.terms['total']:.4f}  lr {p.lr:.5f}  {speed:.0f} img/s"
        )

    def _log_results(self, results: Results) -> None:
        metrics: dict[str, Any] = {"step": self.trainer.step, "epoch": self.epoch}
        for name, values in results.items():
            metrics |= {f"val/{what}@{name}": value for what, value in values.items()}
        self.run_dir.append_metrics(metrics)
        self.wandb.log(metrics)
        top1 = "  ".join(f"{name} {r['top1']:.2f}" for name, r in results.items())
        self.display.say(f"epoch {self.epoch}/{self.config.epochs}  top-1 %: {top1}")

    def _finish(self, results: Results) -> None:
        if not distributed.is_main():
            return
        self.display.say(report.table(results, self.cost))
        plot = self.config.output / "accuracy_flops.png"
        report.plot(plot, self.config.arch, results, self.cost)
        shared, private = self.model.count_parameters()
        self.run_dir.write_json(
            "results.json",
            {
                "gflops": self.cost,
                "parameters": {"shared": shared, "private": private},
                **results,
            },
        )
        self.wandb.log_results(report.COLUMNS, report.rows(results, self.cost), plot)
        self.display.say(f"run directory {self.config.output}, plot {plot}")

    def _save(self, results: Results) -> None:
        """last.pt always; best.pt if it is the best so far."""
        score = self._score(results)
        is_best = score > self.best
        self.best = max(score, self.best)
        if distributed.is_main():
            content = {
                "network": self.network,
                "model": self.model.state_dict(),
                "optimizer": self.trainer.optimizer.state_dict(),
                "scaler": self.trainer.scaler.state_dict(),
                "epoch": self.epoch,
                "step": self.trainer.step,
                "best": self.best,
                "config": as_plain(self.config),
                "wandb_id": self.wandb.run_id,
            }
            if self.trainer.ema:
                content["ema"] = self.trainer.ema.model.state_dict()
            for path in [self.run_dir.last, *([self.run_dir.best] if is_best else [])]:
                checkpoint.save(path, content)
        distributed.barrier()

    def _score(self, results: Results) -> list[float]:
        """Top-1 + top-5 at the largest size, then the mean over the sizes, which decides between equals."""
        scores = [results[str(s)]["top1"] + results[str(s)]["top5"] for s in self.model.sizes]
        return [scores[0], sum(scores) / len(scores)]

    def _say_what_changed(self, source: Path | None, before: dict[str, Any]) -> None:
        now = as_plain(self.config)
        aside = {"data", "output", "resume", "device", "log_interval"}
        changed = [
            f"--{k.replace('_', '-')} {before[k]} -> {now[k]}"
            for k in now
            if before.get(k) is not None
            and now[k] != before[k]
            and k not in aside
            and "wandb" not in k
        ]
        what = f", with changed {', '.join(changed)}" if changed else ""
        self.display.say(f"resumed {source} after epoch {self.epoch}{what}")

    def _restore(self, content: dict[str, Any]) -> None:
        if "optimizer" in content and load_momentum(self.trainer.optimizer, content["optimizer"]):
            self.trainer.scaler.load_state_dict(content["scaler"])
        else:
            self.display.say(
                "the checkpoint has no momentum for these weights: the optimizer starts without"
            )
        if self.trainer.ema and "ema" in content:
            with blame("--resume: the averaged weights do not fit"):
                checkpoint.load_weights(self.trainer.ema.model, content, "ema")
        self.epoch = content["epoch"]
        # Not the checkpoint's step: with another global batch an epoch has another number of them.
        self.trainer.step = self.epoch * self.steps_per_epoch


def cost_of(model: ResolutionSwitchable) -> dict[str, float]:
    """GFLOPs an image at every size and of the ensemble."""
    return report.cost(model.sizes, [gflops(model, size) for size in model.sizes])


def shown_evaluation(
    model: ResolutionSwitchable,
    loaders: Loaders,
    device: torch.device,
    amp: torch.dtype | None,
    display: Display,
) -> Results:
    """`evaluate`, with its progress on the display."""
    display.start("val", len(loaders.val))
    done = 0

    def on_batch() -> None:
        nonlocal done
        done += 1
        display.update(done, "", every=10.0)

    results = evaluate(model, loaders.val, device, amp, on_batch)
    display.stop()
    return results


def _peak_memory_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0

"""One training run: epochs, evaluations, checkpoints; interrupted at any step, and continued there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pipelines.batch import Batch, Loader, Loaders
from pipelines.utils.errors import DataError, UsageError
from rsnet.checkpoint.manager import CheckpointManager
from rsnet.config.resolve import ResolvedConfig
from rsnet.config.train_config import to_plain_dict
from rsnet.distributed import process_group as distributed
from rsnet.distributed.watchdog import Watchdog
from rsnet.evaluation import report
from rsnet.evaluation.evaluate import evaluate
from rsnet.evaluation.report import Results
from rsnet.loggers.console import ConsoleLogger
from rsnet.loggers.run_dir import RunDir
from rsnet.loggers.run_logger import RunLogger, TrainingProgress
from rsnet.models.autocast import AMP_DTYPES
from rsnet.models.factory import gflops
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training import resume as state
from rsnet.training.resume import changes, position
from rsnet.training.signals import StopRequest, TrainingInterrupted
from rsnet.training.trainer import Trainer, make_trainer, raise_if_not_finite

SAVE = 1  # what ranks vote for, besides the number of a signal that asks to stop, which is larger


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
        display: ConsoleLogger,
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
        self.store = CheckpointManager(config.output / "checkpoints", config.keep)
        self.stop = StopRequest()
        self.ballot = distributed.StepVote()
        self.watchdog = Watchdog(config.timeout)
        self.epoch = 0  # epochs that are finished
        self.done = 0  # updates of the one that is not
        self.best: list[float] = []
        self._said: set[str] = set()

    def train(
        self, source: Path | None, content: dict[str, Any] | None, continues: bool
    ) -> Results:
        """All that is left of the training, each epoch with an evaluation and a checkpoint.

        source, content: the checkpoint to start from. continues: as the run that it is of.

        Raises Stopped, once all is saved, if a signal asked for it.
        """
        main = distributed.is_main()
        run_dir = distributed.run_on_main(lambda: RunDir(self.config.output, continues, main))
        run_dir.active = main
        if self.config.on_save_error == "continue":
            run_dir.on_error = self._say_once
        with ExitStack() as stack:
            distributed.run_on_main(lambda: stack.enter_context(run_dir.alone()))
            self.journal = RunLogger(
                self.config, run_dir, self.display, self.steps_per_epoch, self.device
            )
            if content:
                self._restore(source, content)
            wandb_id = None
            if continues:
                if content:
                    self.best, wandb_id = content["best"], content["wandb_id"]
                run_dir.rewind(self.epoch + self.done / self.steps_per_epoch, self.epoch)
            self.journal.open(self.script, self.options, wandb_id)
            return self._journalled(is_best_unknown=bool(content) and continues and not self.best)

    def _journalled(self, is_best_unknown: bool) -> Results:
        """The training, to the end or the point where a signal stops it; the journal is closed after it."""
        failed = True
        try:
            with self.stop.listening(), self.watchdog.running():
                if is_best_unknown:  # imported: it is the best until an epoch is better
                    self.best = self._score(self._evaluate())
                results = self._epochs()
            shared, private = self.model.count_parameters()
            self.journal.results(results, cost_of(self.model), shared, private)
            failed = False
        finally:
            self.journal.close(failed)
        return results

    def _epochs(self) -> Results:
        results: Results | None = None
        self.last_save = time.monotonic()
        for epoch in range(self.epoch, self.config.epochs):
            if self.done == 0:
                self.train_loader.set_epoch(epoch)
            self.display.start(f"epoch {epoch + 1}/{self.config.epochs}", self.steps_per_epoch)
            train_one_epoch(
                self.trainer,
                self.train_loader,
                self.config.log_interval,
                lambda p: self.journal.progress(p, self.epoch, self._alpha()),
                self.done,
                self._after_update,
            )
            self.display.stop()
            self._obey(self.ballot.count())
            self._share_buffers()
            results = self._evaluate()
            self.epoch, self.done = epoch + 1, 0
            self.journal.evaluation(results, self.epoch, self.trainer.step)
            score = self._score(results)
            is_best = score > self.best
            self.best = max(score, self.best)
            self._save(is_best)
        return results or self._evaluate()

    def _after_update(self) -> None:
        self.watchdog.tick()
        self.done += 1
        self._obey(self.ballot.cast(self.stop.number or (SAVE if self._is_save_due() else 0)))

    def _is_save_due(self) -> bool:
        every = self.config.checkpoint_every
        if every.endswith("m"):
            is_due = 0 < 60 * float(every[:-1]) <= time.monotonic() - self.last_save
            if is_due:
                self.last_save = time.monotonic()  # it is voted for now, and done an update later
            return is_due and distributed.is_main()
        return int(every) > 0 and self.done % int(every) == 0

    def _obey(self, agreed: int) -> None:
        """Do what the ranks agreed on after an update: nothing, save, or save and stop."""
        if agreed == 0:
            return
        raise_if_not_finite(self.trainer)
        if agreed > SAVE:
            self.ballot.count()  # what was cast with it
        self._save(is_best=False)
        if agreed > SAVE:
            raise TrainingInterrupted(agreed, self._place())

    def _evaluate(self) -> Results:
        """Of the network, or of the average of what it was. A signal ends it: it is done anew later."""
        least = min(distributed.all_gather_object(len(self.loaders.val)))
        batches = 0

        def after_batch() -> None:
            nonlocal batches
            self.watchdog.tick()
            batches += 1
            # Ranks may have one batch more than others, which they cannot vote on.
            if batches < least:
                self._obey(self.ballot.cast(self.stop.number))

        model = self.trainer.ema.model if self.trainer.ema else self.model
        results = shown_evaluation(
            model, self.loaders, self.device, AMP_DTYPES[self.config.amp], self.display, after_batch
        )
        self._obey(self.ballot.count())
        return results

    def _share_buffers(self) -> None:
        """BatchNorm's statistics become rank 0's everywhere: what is evaluated is what is saved."""
        distributed.broadcast_buffers(self.model)
        if self.trainer.ema:
            distributed.broadcast_buffers(self.trainer.ema.model)

    def _score(self, results: Results) -> list[float]:
        """Top-1 + top-5 at the largest size, then the mean over the sizes, which decides between equals."""
        scores = [results[str(s)]["top1"] + results[str(s)]["top5"] for s in self.model.sizes]
        return [scores[0], sum(scores) / len(scores)]

    def _alpha(self) -> dict[int, float]:
        return dict(zip(self.model.sizes, self.model.ensemble_weights().tolist(), strict=True))

    def _place(self) -> str:
        return f"update {self.done}/{self.steps_per_epoch} of epoch {self.epoch + 1}"

    def _save(self, is_best: bool) -> None:
        content = {
            "network": self.network,
            "config": to_plain_dict(self.config),
            "global_batch": self.journal.global_batch,
            "epoch": self.epoch,
            "done": self.done,
            "loader": self.train_loader.state_dict(),
            "best": self.best,
            "wandb_id": self.journal.wandb.run_id,
            **state.training_state(self.trainer, self.model),
        }

        def write() -> str:
            try:
                self.journal.run_dir.sync()
                self.store.save(content, is_best)
            except OSError as error:
                return f"cannot save to {self.store.folder}: {error.strerror or error}"
            return ""

        problem = distributed.run_on_main(write)
        self.last_save = time.monotonic()
        self.watchdog.tick()
        if problem and self.config.on_save_error == "stop":
            raise DataError(
                f"{problem}; the checkpoint before it is whole: free some space and run the same command, "
                "or train on with --on-save-error continue"
            )
        if problem:
            self.display.say(f"{problem}; the checkpoint before it stays, the training goes on")

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.display.say(f"{line}; the training goes on")

    def _restore(self, source: Path | None, content: dict[str, Any]) -> None:
        missing = state.load_training_state(self.trainer, self.model, content)
        self.epoch = content["epoch"]
        self.done, moved = position(
            content, self.config, self.train_loader, self.journal.global_batch, self.steps_per_epoch
        )
        # Not the checkpoint's step: with another global batch an epoch has another number of them.
        self.trainer.step = self.epoch * self.steps_per_epoch + self.done
        changed = changes(content["config"], to_plain_dict(self.config))
        what = f", with changed {', '.join(changed)}" if changed else ""
        where = f"after epoch {self.epoch}" if self.done == 0 else f"after {self._place()}"
        self.display.say(f"resumed {source} {where}{what}")
        for line in (*missing, *moved):
            self.display.say(f"not as before: {line}")


def cost_of(model: ResolutionSwitchable) -> dict[str, float]:
    """GFLOPs an image at every size and of the ensemble."""
    return report.cost(model.sizes, [gflops(model, size) for size in model.sizes])


def shown_evaluation(
    model: ResolutionSwitchable,
    loaders: Loaders,
    device: torch.device,
    amp: torch.dtype | None,
    display: ConsoleLogger,
    after_batch: Callable[[], None] = lambda: None,
) -> Results:
    """`evaluate`, with its progress on the display."""
    display.start("val", len(loaders.val))
    done = 0

    def on_batch() -> None:
        nonlocal done
        done += 1
        display.update(done, "", every=10.0)
        after_batch()

    results = evaluate(model, loaders.val, device, amp, on_batch)
    display.stop()
    return results


def train_one_epoch(
    trainer: Trainer,
    loader: Loader,
    log_interval: int,
    report: Callable[[TrainingProgress], None],
    done: int = 0,
    after_update: Callable[[], None] = lambda: None,
) -> None:
    """Train on every batch that fills an update. Calls `report`, and synchronises, every
    `log_interval` updates and after the last; and `after_update`, which may end the epoch by raising.

    done: updates of this epoch that were done before; the loader goes on behind them.

    Raises DataError if a loss was not finite: the weights are those before that step.
    """
    trainer.objective.train()
    steps = len(loader) // trainer.accumulate
    clock = _Clock(loader)
    reported = done
    images = 0
    for i, batch in enumerate(islice(clock, (steps - done) * trainer.accumulate), start=1):
        last = i % trainer.accumulate == 0
        trainer.means.add(trainer.forward_backward(batch, last))
        images += len(batch.labels)
        if not last:
            continue
        lr = trainer.schedule.at(trainer.step)
        trainer.update()
        done += 1
        if done % log_interval == 0 or done == steps:
            terms = (
                trainer.means.compute()
            )  # synchronises, so that the clock measures finished work
            raise_if_not_finite(trainer)
            total, waited = clock.lap()
            span = done - reported
            report(
                TrainingProgress(
                    trainer.step, done, lr, terms, images / total, waited / span, total / span,
                    trainer.guard.skipped(),
                )
            )  # fmt: skip
            reported, images = done, 0
        after_update()


class _Clock:
    """Iterates over a loader and adds up the time that it takes to deliver."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._start = time.perf_counter()
        self._waited = 0.0

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap: all, and waiting."""
        now = time.perf_counter()
        result = now - self._start, self._waited
        self._start, self._waited = now, 0.0
        return result

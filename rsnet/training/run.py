"""One training run: epochs, evaluations, checkpoints; interrupted at any step, and continued there."""

from __future__ import annotations

import copy
import dataclasses
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from pipelines.utils.errors import RunError, UsageError, error_context
from pipelines.utils.library_output import keep_library_output
from rsnet.checkpoint import io
from rsnet.checkpoint.checkpoint import BEST_BY, Checkpoint
from rsnet.checkpoint.manager import CheckpointManager
from rsnet.checkpoint.uploader import Uploader
from rsnet.checkpoint.weights import load_weights
from rsnet.config.size_schedule import sizes_in
from rsnet.config.train_config import to_plain_dict
from rsnet.distributed import process_group as distributed
from rsnet.distributed.watchdog import Watchdog
from rsnet.evaluation.evaluate import evaluate
from rsnet.evaluation.report import Results
from rsnet.loggers.run_context import RunContext
from rsnet.loggers.run_dir import RunDir
from rsnet.loggers.run_logger import RunLogger
from rsnet.loggers.wandb_logger import known_run_id
from rsnet.models.autocast import AMP_DTYPES
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.loop import train_one_epoch
from rsnet.training.resume import Start, changes
from rsnet.training.signals import StopRequest, TrainingInterrupted
from rsnet.training.size_schedule import follow_nearest
from rsnet.training.state import load_training_state, restore_position, training_state
from rsnet.training.trainer import Trainer, make_trainer, raise_if_not_finite
from rsnet.training.upload import make_uploader, start_upload, upload, waited_for

SAVE = 1  # a vote is 0, SAVE, or STOP plus the signal's number
STOP = 1000


def train(context: RunContext, start: Start) -> Results:
    """Train to the end, each epoch with an evaluation and a checkpoint; return the last evaluation.

    Raises TrainingInterrupted, once all is saved, if a signal asked for it.
    """
    config, main = context.config, distributed.is_main()
    assert context.loaders.train is not None
    batches = len(context.loaders.train)
    steps_per_epoch = batches // config.accumulate
    if steps_per_epoch == 0:
        raise UsageError(f"--accumulate {config.accumulate}: an epoch has only {batches} batches")
    trainer = make_trainer(
        config,
        context.model,
        context.network.num_classes,
        steps_per_epoch,
        context.device,
        context.console.say,
        teacher=context.teacher,
    )
    run_dir = distributed.run_on_main(lambda: RunDir(config.folder, start.continues, main))
    run_dir.active = main
    if start.adopted:
        context.console.say(f"from the run in {config.output}: {', '.join(start.adopted)}")
    with ExitStack() as stack:
        distributed.run_on_main(lambda: stack.enter_context(run_dir.alone()))
        context.console.log = run_dir.note
        keep_library_output(config.folder / "libraries.log")
        uploader = make_uploader(context, start.continues)
        stack.enter_context(waited_for(uploader, context))
        try:
            return TrainingRun(context, trainer, run_dir, start, uploader).run()
        except TrainingInterrupted as stop:
            context.console.log(f"stopped by {stop}")
            raise
        except Exception as error:
            where = "" if main else f"rank {distributed.rank()}: "
            run_dir.note(where + "".join(traceback.format_exception(error)))
            raise


class TrainingRun:
    """State of a training run, from its first epoch to its last.

    start: checkpoint to resume from, which is restored here; then the header is written.
    """

    def __init__(
        self,
        context: RunContext,
        trainer: Trainer,
        run_dir: RunDir,
        start: Start,
        uploader: Uploader | None,
    ) -> None:
        assert context.loaders.train is not None
        self.context, self.trainer, self.run_dir = context, trainer, run_dir
        self.config, self.model, self.console = context.config, context.model, context.console
        self.train_loader = context.loaders.train
        self.steps_per_epoch = len(self.train_loader) // trainer.accumulate
        self.manager = CheckpointManager(self.config.folder / "checkpoints", self.config.keep)
        self.uploader = uploader
        self.stop = StopRequest()
        self.vote = distributed.StepVote()
        self.watchdog = Watchdog(self.config.timeout, run_dir.note)
        self.epoch = 0  # epochs that are finished
        self.done = 0  # updates of the one that is not
        self.best: list[float] = []  # the score of best.pt; empty without one
        self._unscored: Checkpoint | None = None  # best.pt, if its score is not known
        self.last_save = time.monotonic()
        self._warned: set[str] = set()
        if self.config.on_save_error == "continue":
            run_dir.on_error = self._warn_once
        wandb_id = None
        if start.checkpoint is not None:
            self._restore(start, start.checkpoint)
            if start.continues:
                wandb_id = start.checkpoint.wandb_id or known_run_id(self.config.folder)
        if start.continues:
            self._restore_best()
            run_dir.rewind(self.epoch + self.done / self.steps_per_epoch, self.epoch)
        start_upload(uploader, context)
        self.logger = RunLogger(context, run_dir, self.steps_per_epoch, wandb_id)
        if start.continues and uploader and self.manager.last.exists():
            uploader.add(self.epoch, self.done)  # it may be newer than what is there

    def run(self) -> Results:
        """Train to the end, or to the step where a signal stops it. The logger is closed afterwards."""
        failed = True
        try:
            with self.stop.listening(), self.watchdog.running():
                if self._unscored is not None:
                    self._score_best(self._unscored)
                results = self._train_epochs()
            shared, private = self.model.count_parameters()
            self.logger.log_results(results, self.context.cost, shared, private)
            failed = False
        finally:
            self.logger.close(failed)
        return results

    def _train_epochs(self) -> Results:
        results: Results | None = None
        self.last_save = time.monotonic()
        for epoch in range(self.epoch, self.config.epochs):
            if self.done == 0:
                self.train_loader.set_epoch(epoch)
            self.logger.begin_epoch(epoch, self.done)
            train_one_epoch(
                self.trainer,
                self.train_loader,
                self.config.log_interval,
                lambda p: self.logger.log_progress(p, self.epoch, self._alpha()),
                self.done,
                self._after_update,
                # So that the watchdog can tell a rank that waits for data from ranks that wait for it.
                on_batch=self.watchdog.tick,
            )
            self.logger.end_epoch()
            self._act_on(self.vote.count())
            self._share_buffers()
            self._follow_nearest()
            is_last = epoch + 1 == self.config.epochs
            is_due = is_last or (epoch + 1) % self.config.val_interval == 0
            results = self._evaluate() if is_due else None
            self.epoch, self.done = epoch + 1, 0
            if results is None:
                self._save()
                continue
            self.logger.log_evaluation(results, self.epoch, self.trainer.step)
            reached = score(results, self.model.sizes)
            self._save(reached if reached > self.best else None)
        return results or self._evaluate()

    def _after_update(self) -> None:
        self.watchdog.tick()
        self.done += 1
        self.logger.log_update(self.done)
        self._act_on(self.vote.cast(self._asked() or (SAVE if self._is_save_due() else 0)))

    def _asked(self) -> int:
        return STOP + self.stop.number if self.stop.number else 0

    def _is_save_due(self) -> bool:
        every = self.config.checkpoint_every
        if every.endswith("m"):
            is_due = 0 < 60 * float(every[:-1]) <= time.monotonic() - self.last_save
            if is_due:
                # The vote is cast now, the checkpoint is saved one update later.
                self.last_save = time.monotonic()
            return is_due and distributed.is_main()
        return int(every) > 0 and self.done % int(every) == 0

    def _act_on(self, agreed: int) -> None:
        """Do what the ranks agreed on after an update: nothing, save, or save and stop."""
        if agreed == 0:
            return
        raise_if_not_finite(self.trainer)
        if agreed > STOP:
            self.vote.count()  # drop the vote that is still pending
        self._save(stops=agreed > STOP)
        if agreed > STOP:
            raise TrainingInterrupted(agreed - STOP, self._place())

    def _evaluate(self, model: ResolutionSwitchable | None = None) -> Results:
        """Evaluate the network, or its averaged weights, or another `model`.

        A signal ends it; the resumed run repeats it.
        """
        loaders = self.context.loaders
        least = min(distributed.all_gather_object(len(loaders.val)))
        batches = 0

        def after_batch() -> None:
            nonlocal batches
            batches += 1
            # Some ranks may have one batch more than others; it has no vote, and must not make the others
            # look stuck.
            if batches < least:
                self.watchdog.tick()
                self._act_on(self.vote.cast(self._asked()))

        if model is None:
            model = self.trainer.ema.model if self.trainer.ema else self.model
        results = evaluate_with_progress(self.context, model, after_batch)
        self._act_on(self.vote.count())
        return results

    def _share_buffers(self) -> None:
        """Give all ranks the BatchNorm statistics of rank 0: what is evaluated is what is saved."""
        distributed.broadcast_buffers(self.model)
        if self.trainer.ema:
            distributed.broadcast_buffers(self.trainer.ema.model)

    def _follow_nearest(self, within: int | None = None) -> None:
        """Give sizes that --size-schedule has not trained yet the BatchNorm of the nearest one.

        within: an epoch, whose sizes are left as they are: some may be still to be drawn.
        """
        phases = self.config.phases
        if len(phases) < 2:
            return
        but = () if within is None else sizes_in(phases, within)
        follow_nearest(self.model, but)
        if self.trainer.ema:
            follow_nearest(self.trainer.ema.model, but)

    def _alpha(self) -> dict[int, float]:
        return dict(zip(self.model.sizes, self.model.ensemble_weights().tolist(), strict=True))

    def _place(self) -> str:
        return f"update {self.done}/{self.steps_per_epoch} of epoch {self.epoch + 1}"

    def _save(self, new_best: list[float] | None = None, stops: bool = False) -> None:
        """Save a checkpoint; new_best: its score, if it is the best so far. stops: whether it is the last."""
        self._follow_nearest(self.epoch)  # a save must not change what is trained
        checkpoint = Checkpoint(
            network=self.context.network,
            config=to_plain_dict(self.config),
            global_batch=self.context.global_batch,
            epoch=self.epoch,
            done=self.done,
            loader=self.train_loader.state_dict(),
            best=new_best or self.best,
            best_by=BEST_BY,
            wandb_id=self.logger.wandb.run_id,
            **training_state(self.trainer, self.model),
        )

        def write() -> tuple[str, bool, list[float]]:
            try:
                self.run_dir.sync()
                self.manager.save(checkpoint, new_best is not None)
            except OSError as error:
                problem = f"cannot save to {self.manager.folder}: {error.strerror or error}"
                best = self.best
                if new_best is not None:  # best.pt may be the old one or the new one
                    found = self.manager.load_best(self.console.say)
                    best = found.score if found else []
                return problem, self.manager.last.exists(), best
            return "", True, checkpoint.best

        problem, has_older, self.best = distributed.run_on_main(write)
        self.last_save = time.monotonic()
        self.watchdog.tick()
        if problem and self.config.on_save_error == "stop":
            older = (
                "the checkpoint before it is whole" if has_older else "there is no checkpoint yet"
            )
            raise RunError(
                f"{problem}; {older}: free some space and run the same command, "
                "or train on with --on-save-error continue"
            )
        if problem:
            older = "the checkpoint before it stays" if has_older else "there is no checkpoint yet"
            self.console.say(f"{problem}; {older}, the training goes on")
        elif stops and self.uploader:
            self.uploader.add(self.epoch, self.done)  # all that can go wrong is said at the end
        elif not stops:
            upload(self.uploader, self.context, self.epoch, self.done)

    def _restore_best(self) -> None:
        """Take the score to beat from best.pt itself, whichever checkpoint the run resumes from."""
        best = distributed.run_on_main(lambda: self.manager.load_best(self.console.say))
        if best is not None:
            self.best = best.score
            # Of an imported network, or of version 0.1.0's other score.
            self._unscored = None if best.score else best

    def _score_best(self, checkpoint: Checkpoint) -> None:
        """Evaluate best.pt and note its score there: it stays the best until an epoch is better."""
        model = copy.deepcopy(self.model)
        with error_context(f"{self.manager.best} does not fit"):
            load_weights(model, checkpoint.eval_weights, checkpoint.network.sizes)
        self.best = score(self._evaluate(model), self.model.sizes)
        scored = dataclasses.replace(checkpoint, best=self.best, best_by=BEST_BY)
        distributed.run_on_main(lambda: io.save(self.manager.best, scored))

    def _warn_once(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            self.console.say(f"{line}; the training goes on")

    def _restore(self, start: Start, checkpoint: Checkpoint) -> None:
        """Restore all that the checkpoint holds besides the weights, and print where training resumes."""
        missing = load_training_state(self.trainer, self.model, checkpoint)
        self.epoch = checkpoint.epoch
        self.done, moved = restore_position(
            checkpoint,
            self.config,
            self.train_loader,
            self.context.global_batch,
            self.steps_per_epoch,
        )
        # Not the checkpoint's step: with another global batch an epoch has another number of them.
        self.trainer.step = self.epoch * self.steps_per_epoch + self.done
        changed = changes(checkpoint.config, to_plain_dict(self.config))
        what = f", with changed {', '.join(changed)}" if changed else ""
        where = f"after epoch {self.epoch}" if self.done == 0 else f"after {self._place()}"
        finished = start.require_unfinished(self.config)
        self.console.say(finished or f"resumed {start.source} {where}{what}")
        for line in (*missing, *moved):
            self.console.say(f"not as before: {line}")


def score(results: Results, sizes: Sequence[int]) -> list[float]:
    """Return top-1 at the largest size, then the mean of all sizes' top-1 and top-5, which decides a tie."""
    of_sizes = [results[str(s)] for s in sizes]
    both = [r["top1"] + r["top5"] for r in of_sizes]
    return [of_sizes[0]["top1"], sum(both) / (2 * len(both))]


def evaluate_with_progress(
    context: RunContext,
    model: ResolutionSwitchable,
    after_batch: Callable[[], None] = lambda: None,
) -> Results:
    """Evaluate `model` on the run's validation data, and show the progress on the console."""
    console, loader = context.console, context.loaders.val
    images = context.config.batch_size * distributed.world_size()
    console.start("val", len(loader), images=images)
    done = 0

    def on_batch() -> None:
        nonlocal done
        done += 1
        console.update(done)
        after_batch()

    results = evaluate(model, loader, context.device, AMP_DTYPES[context.config.amp], on_batch)
    console.stop()
    return results

"""One epoch of training steps, and how fast they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice

from pipelines.batch import Batch, Loader
from rsnet.loggers.run_logger import TrainingProgress
from rsnet.training.trainer import Trainer, raise_if_not_finite


def train_one_epoch(
    trainer: Trainer,
    loader: Loader,
    log_interval: int,
    on_progress: Callable[[TrainingProgress], None],
    done: int = 0,
    after_update: Callable[[], None] = lambda: None,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Train one epoch; batches left over after the last full update are dropped. Every `log_interval`
    updates and after the last one, synchronises and calls `on_progress`. Calls `on_batch` when a batch
    arrives and `after_update`, which may end the epoch by raising, after each update. done: updates of this
    epoch that an earlier run did; the loader resumes after them.

    Raises RunError if a loss or gradient was not finite: the weights are those before that step.
    """
    trainer.objective.train()
    steps = len(loader) // trainer.accumulate
    clock = _LoaderClock(loader)
    reported = done
    images = 0
    for i, batch in enumerate(islice(clock, (steps - done) * trainer.accumulate), start=1):
        on_batch()
        last = i % trainer.accumulate == 0
        trainer.means.add(trainer.forward_backward(batch, last))
        images += len(batch.labels)
        if not last:
            continue
        lr = trainer.schedule.at(trainer.step)
        trainer.update()
        done += 1
        if done % log_interval == 0 or done == steps:
            # Synchronises, so that the clock measures finished work.
            terms = trainer.means.compute()
            raise_if_not_finite(trainer)
            total, waited = clock.lap()
            span = done - reported
            on_progress(
                TrainingProgress(
                    step=trainer.step,
                    steps_in_epoch=done,
                    lr=lr,
                    terms=terms,
                    images_per_s=images / total,
                    data_time=waited / span,
                    step_time=total / span,
                    skipped=trainer.guard.skipped(),
                )
            )
            reported, images = done, 0
        after_update()


class _LoaderClock:
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
        """Return the seconds since the last lap: all, and waiting."""
        now = time.perf_counter()
        result = now - self._start, self._waited
        self._start, self._waited = now, 0.0
        return result

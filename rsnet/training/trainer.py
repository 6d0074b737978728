"""The training step, the epoch and the evaluation. The single backward is here and nowhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.batch import Batch, Loader
from pipelines.utils.errors import DataError
from rsnet.evaluation.metrics import Accuracy, FiniteGuard, TermMeans
from rsnet.inference.runner import Forward
from rsnet.models.fold import is_foldable
from rsnet.models.quantization.bases import Bases
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.ema import Ema
from rsnet.training.nonfinite import RunningStatistics
from rsnet.training.optim import LrSchedule


@dataclass(frozen=True)
class Progress:
    """What the steps since the last report were like. Times in seconds a step, of this process."""

    step: int
    steps_in_epoch: int  # done in this epoch
    lr: float
    terms: dict[str, float]
    images_per_s: float  # of this process
    data_time: float  # waiting for the loader
    step_time: float
    skipped: int  # updates so far that were left out, see `FiniteGuard`


class Trainer:
    """An objective with its optimizer: what `train_one_epoch` changes and a checkpoint keeps.

    amp: the autocast dtype, or None for float32. float16 comes with a loss scaler.
    accumulate: batches whose gradients make up one update.
    clip_grad: largest norm of the gradients, or None.
    sizes_at: optimizer step -> the sizes that take part in it, or None for all.
    mix: (batch, its number in the training) -> a batch of mixed samples.
    most_skipped: updates in a row that may be left out because a loss is not finite.
    bases: those of learned quantizers, which follow every update.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LrSchedule,
        device: torch.device,
        amp: torch.dtype | None = None,
        accumulate: int = 1,
        clip_grad: float | None = None,
        sizes_at: Callable[[int], Sequence[int] | None] = lambda _step: None,
        mix: Callable[[Batch, int], Batch] | None = None,
        ema: Ema | None = None,
        most_skipped: int = 0,
        bases: Bases | None = None,
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.schedule = schedule
        self.device = device
        self.amp = amp
        self.accumulate = accumulate
        self.clip_grad = clip_grad
        self.sizes_at = sizes_at
        self.mix = mix
        self.ema = ema
        self.bases = bases
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        self.guard = FiniteGuard(device, most_skipped)
        self.means = TermMeans()  # since the last report
        self._statistics = RunningStatistics(objective) if most_skipped else None
        self.step = 0
        self._batches = 0  # since the last update

    def forward_backward(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        """Add one batch's gradients; `last` of those that make up an update. Does not synchronise."""
        if self.mix is not None:
            batch = self.mix(batch, self.step * self.accumulate + self._batches)
        if self._statistics is not None and self._batches == 0:
            self._statistics.keep()
        self._batches += 1
        with nullcontext() if last else self._no_all_reduce():
            with autocast(self.device, self.amp):
                terms: dict[str, Tensor] = self.objective(
                    batch.images, batch.labels, self.sizes_at(self.step)
                )
            left_out = self.guard.check(terms)
            loss = terms["total"] / self.accumulate
            if self.scaler.is_enabled():
                # The scaler skips an update whose gradients are NaN; without one see `update`.
                loss = loss * torch.where(left_out > 0, torch.nan, 1.0)
            else:
                self.optimizer.found_inf = left_out  # type: ignore[attr-defined]
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return terms

    def update(self) -> None:
        """One optimizer step, which fused SGD skips on the device if `found_inf` is 1."""
        lr = self.schedule.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.bases is not None:
            self.bases.update(self.sizes_at(self.step))
        if self._statistics is not None:
            self._statistics.put_back_if(self.guard.is_bad)
        if self.ema is not None:
            self.ema.update(self.step)
        self.guard.close(self.step)
        self.step += 1
        self._batches = 0

    def _no_all_reduce(self) -> AbstractContextManager[None]:
        if isinstance(self.objective, DistributedDataParallel):
            return self.objective.no_sync()
        return nullcontext()


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Autocast without its weight cache, which would add up the five gradients of a shared weight in
    half precision; without it they are summed in float32."""
    return torch.autocast(
        device.type, dtype=dtype or torch.float32, enabled=dtype is not None, cache_enabled=False
    )


def train_one_epoch(
    trainer: Trainer,
    loader: Loader,
    log_interval: int,
    report: Callable[[Progress], None],
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
                Progress(
                    trainer.step, done, lr, terms, images / total, waited / span, total / span,
                    trainer.guard.skipped(),
                )
            )  # fmt: skip
            reported, images = done, 0
        after_update()


@torch.no_grad()
def evaluate(
    model: ResolutionSwitchable,
    loader: Loader,
    device: torch.device,
    amp: torch.dtype | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Top-1, top-5 and loss at every size and of the ensemble, over all ranks' images.

    Every image counts once. Calls `on_batch` after each batch. BatchNorm is folded into the convolutions
    unless activations are quantized: the same logits but for rounding, in four fifths of the time.
    """
    was_training = model.training
    model.eval()
    accuracy = Accuracy(model.sizes, device)
    forward_all = (
        _folded_forward_all(model, device, amp) if is_foldable(model) else model.forward_all
    )
    for batch in loader:
        with autocast(device, amp):
            logits = forward_all(batch.images)
        accuracy.add(logits, batch.labels, model.alpha)
        on_batch()
    model.train(was_training)
    return accuracy.compute()


def _folded_forward_all(
    model: ResolutionSwitchable, device: torch.device, amp: torch.dtype | None
) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    forward = Forward(model, device, amp, batch_size=1, fold=True, cuda_graphs=False)
    return lambda images: tuple(forward(x, s) for x, s in zip(images, model.sizes, strict=True))


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


def raise_if_not_finite(trainer: Trainer) -> None:
    """Raise DataError if an update had to be left out that may not be. Synchronises."""
    if (verdict := trainer.guard.verdict()) is None:
        return
    step, terms = verdict
    names = ", ".join(t for t in terms if t != "total")
    raise DataError(
        f"the loss is not finite at step {step}: {names or 'total'}; the weights were not updated with it. "
        "Lower --lr, set --clip-grad, try --amp off, or --on-nonfinite skip 10"
    )

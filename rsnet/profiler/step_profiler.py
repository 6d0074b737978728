"""Profiler of training steps: the loader alone, the computation alone, and both together."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import torch
from torch import nn

from pipelines.batch import Batch, Loader, copy_batch
from rsnet.distributed.device import peak_memory_gb
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training import cuda_graph
from rsnet.training.trainer import Trainer

WARMUP_STEPS = 3  # compilers, allocators and cuDNN's search are done by then


@dataclass(frozen=True)
class Times:
    """Milliseconds a step: of each step, and the mean of each part."""

    steps: list[float]
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return statistics.mean(self.steps)

    @property
    def spread(self) -> float:
        """Standard deviation over the steps."""
        return statistics.stdev(self.steps) if len(self.steps) > 1 else 0.0


@dataclass(frozen=True)
class Profile:
    """The three measurements of one configuration."""

    images: int  # of an update, of this process
    loader: Times
    compute: Times
    end_to_end: Times
    peak_memory_gb: float | None  # of a GPU
    tflops: float  # achieved, computation alone
    peak_tflops: float  # of a large matrix product in the same precision
    teacher_mb: float | None = None  # of the weights of a teacher, if there is one

    def images_per_s(self, times: Times) -> float:
        return 1000 * self.images / times.mean

    @property
    def mfu(self) -> float:
        """Share of the measured matrix peak (model FLOPs utilisation)."""
        return self.tflops / self.peak_tflops

    @property
    def idle(self) -> float:
        """Share of an end-to-end step in which the device waits for images."""
        return max(0.0, 1 - self.compute.mean / self.end_to_end.mean)

    @property
    def bottleneck(self) -> str:
        """ "loader" or "network", whichever takes longer alone."""
        return "loader" if self.loader.mean > self.compute.mean else "network"


class OutOfTimeError(Exception):
    """The deadline came before a measurement was finished."""


class Stopwatch:
    """Named moments of steps, on the device's clock where it has one; read when all steps are done.

    Reading synchronises: in a step it would let the device wait for the host, which no training does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = [("start", self._now())]

    def mark(self, name: str) -> None:
        """End the part `name` of a step."""
        self._marks.append((name, self._now()))

    def read(self, last: str) -> list[dict[str, float]]:
        """Return the milliseconds of each part since the one before it, by step; a step ends with `last`."""
        synchronize(self._device)
        steps: list[dict[str, float]] = [{}]
        for (_, before), (name, after) in pairwise(self._marks):
            took = (
                before.elapsed_time(after)
                if hasattr(after, "elapsed_time")
                else 1000 * (after - before)
            )
            steps[-1][name] = steps[-1].get(name, 0.0) + took
            if name == last:
                steps.append({})
        return steps[:-1]

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(
    trainer: Trainer,
    model: ResolutionSwitchable,
    loader: Loader,
    step_gmacs: float,
    steps: int,
    deadline: float = math.inf,
) -> Profile:
    """Measure `steps` steps of each kind. The trainer really trains, so its weights should be discarded
    afterwards.

    step_gmacs: forward GMACs of one image at all sizes, without a teacher. deadline: of `time.perf_counter`.

    Raises OutOfTimeError at the first batch after the deadline.
    """

    def in_time(source: Iterator[Batch]) -> Iterator[Batch]:
        for batch in source:
            if time.perf_counter() > deadline:
                raise OutOfTimeError
            yield batch

    device = trainer.device
    # The loader may use their memory for the next ones.
    batches = [copy_batch(batch) for batch in islice(in_time(endless(loader)), 2)]
    images = len(batches[0].labels) * trainer.accumulate
    alone = time_loader(in_time(endless(loader)), device, steps, trainer.accumulate)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    compute = time_steps(trainer, model, in_time(_repeat(batches)), steps)
    peak = peak_memory_gb(device)
    together = time_steps(trainer, model, in_time(endless(loader)), steps)
    # Backward is twice forward: gradients of inputs and of weights. A teacher has none. A MAC is two FLOPs.
    teacher = trainer.teacher
    gmacs = 3 * step_gmacs + (teacher.gmacs if teacher else 0.0)
    return Profile(
        images,
        alone,
        compute,
        together,
        peak,
        2 * gmacs * images / compute.mean,
        measure_peak_tflops(device, trainer.amp),
        teacher.megabytes if teacher else None,
    )


def time_loader(
    source: Iterator[Batch], device: torch.device, steps: int, accumulate: int
) -> Times:
    """Time the batches of an update until they are ready on the device."""
    taken = []
    for i in range(WARMUP_STEPS + steps):
        start = time.perf_counter()
        for _ in range(accumulate):
            next(source)
        synchronize(device)
        if i >= WARMUP_STEPS:
            taken.append(1000 * (time.perf_counter() - start))
    return Times(taken)


def time_steps(
    trainer: Trainer, model: ResolutionSwitchable, source: Iterator[Batch], steps: int
) -> Times:
    """Time whole updates by their parts: data, teacher, forward at each size, losses, backward, optimizer."""
    warm_up, watch = WARMUP_STEPS, Stopwatch(trainer.device)
    hooks: list[Any] = []
    if trainer.graphs is not None:  # the graph includes the optimizer step
        computed = "forward to optimizer"
        warm_up += cuda_graph.WARM_UP
    elif any(m._compiled_call_impl is not None for m in trainer.objective.modules()):
        computed = "forward and backward"  # hooks would break the compiled graph
    else:
        computed = "backward"
        hooks = _hooks(trainer, model, watch)  # which mark the parts of the forward
    trainer.objective.train()
    try:
        for _ in range(warm_up + steps):
            for micro in range(trainer.accumulate):
                batch = next(source)
                watch.mark("data")
                trainer.forward_backward(batch, last=micro == trainer.accumulate - 1)
                watch.mark(computed)
            trainer.update()
            watch.mark("optimizer")
    finally:
        for hook in hooks:
            hook.remove()
    parts = watch.read(last="optimizer")[warm_up:]
    names = dict.fromkeys(
        name for p in parts for name in p
    )  # with K sizes a step not always the same
    means = {name: statistics.mean(p.get(name, 0.0) for p in parts) for name in names}
    return Times([sum(p.values()) for p in parts], means)


def measure_peak_tflops(device: torch.device, dtype: torch.dtype | None) -> float:
    """Return the best rate of a few large matrix products, in the precision of the convolutions."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype or torch.float32)
    best = float("inf")
    # A GPU's convolutions of float32 are TF32, which PyTorch does not let products be by default.
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        for _ in range(5):
            synchronize(device)
            start = time.perf_counter()
            a @ a
            synchronize(device)
            best = min(best, time.perf_counter() - start)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return 2 * n**3 / best / 1e12


def endless(loader: Loader) -> Iterator[Batch]:
    """Yield batches, epoch after epoch."""
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def _repeat(batches: Sequence[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def _hooks(trainer: Trainer, model: ResolutionSwitchable, watch: Stopwatch) -> list[Any]:
    """Set marks behind the forwards of the teacher and of each size, and behind the losses."""

    def after_size(_module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        watch.mark(f"forward {inputs[0].shape[-1]}")

    def after_losses(*_: Any) -> None:
        watch.mark("losses")

    def after_teacher(*_: Any) -> None:
        watch.mark("teacher")

    return [
        *([trainer.teacher.register_forward_hook(after_teacher)] if trainer.teacher else []),
        model.register_forward_hook(after_size),
        trainer.objective.register_forward_hook(after_losses),
    ]

"""Batches from .beton files: threads read, decode, crop and resize; the device normalises.

FFCV's own loader is not used, for what it does in silence: a damaged JPEG leaves the pixels of an earlier
batch, an exception in its thread makes the consumer wait for ever, its crops ignore the seed, and an epoch
that is left early keeps its thread. Its files and its libraries are.
"""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import ffcv_decode, sidecar
from pipelines.batch import Batch, Draws, Loaders, LoaderSpec, PixelNormalizer, byte_table
from pipelines.beton_file import Beton, Samples, open_beton
from pipelines.beton_verify import reasons
from pipelines.errors import DataError, UsageError
from pipelines.ffcv import FfcvOptions
from pipelines.ffcv_decode import CUT_OFF, FINE, Views
from pipelines.page_order import PageSchedule
from pipelines.sampling import Indices, Schedule, ScheduledLoader, draw, schedule_for
from pipelines.turbojpeg import JpegDecoder

CHUNK = 4  # images a task: few, so that the threads finish a batch together
READ_AHEAD = 8  # batches, quasi-random order


def open_loaders(options: FfcvOptions, spec: LoaderSpec, with_train: bool) -> Loaders:
    """As `ffcv.make_loaders`."""
    if not spec.data.is_dir():
        raise UsageError(f"--data: there is no folder {spec.data}")
    paths = [
        spec.data / f"{split}.beton" for split in (("train", "val") if with_train else ("val",))
    ]
    betons = [open_beton(path) for path in paths]
    sidecars = [_checked(options, spec, beton) for beton in betons]
    classes = _common_classes(spec.data, betons, sidecars)
    loaders = [
        FfcvLoader(options, spec, beton, classes, training=beton.path.stem == "train")
        for beton in betons
    ]
    return Loaders(loaders[0] if with_train else None, loaders[-1], classes)


def _checked(options: FfcvOptions, spec: LoaderSpec, beton: Beton) -> sidecar.Sidecar | None:
    """The file's sidecar, which agrees with it; without one every sample is decoded, unless trusted."""
    found = sidecar.read(beton.path)
    if found is not None:
        sidecar.check(found, beton.path, len(beton))
    elif not options.trust:
        if spec.rank == 0:
            print(
                f"warning: {beton.path} has no sidecar: checking all {len(beton)} samples "
                "(--trust leaves that out)",
                file=sys.stderr,
            )
        share = np.arange(spec.rank, len(beton), spec.world_size)
        for index, reason in zip(
            share.tolist(), reasons(beton, share, options.workers), strict=True
        ):
            if reason is not None:
                raise _broken(beton, index, str(beton.labels[index]), reason)
    return found


def _common_classes(
    data: Path, betons: list[Beton], sidecars: list[sidecar.Sidecar | None]
) -> list[str]:
    """The class list that all sidecars share; numbers, if there is no sidecar."""
    outputs = max(int(beton.labels.max()) + 1 for beton in betons)
    lists = [found.classes for found in sidecars if found is not None]
    if not lists:
        return [str(label) for label in range(outputs)]
    if any(classes != lists[0] for classes in lists):
        different = sorted(set(lists[0]) ^ set(lists[-1]))
        raise UsageError(
            f"--data: the classes of {data}/train.beton and {data}/val.beton differ"
            + (f": {', '.join(different[:5])}" if different else " in their order")
        )
    if outputs > len(lists[0]):
        raise DataError(f"{data}: there is a label {outputs - 1}, but {len(lists[0])} classes")
    return lists[0]


def _broken(beton: Beton, index: int, name: str, reason: str) -> DataError:
    return DataError(
        f"{beton.path}: sample {index} (class {name}) is broken: {reason}; "
        f"python -m pipelines.beton --verify {beton.path} lists all that are"
    )


class FfcvLoader(ScheduledLoader):
    """Batches of one file. A sample that cannot be read raises DataError with its index."""

    def __init__(
        self,
        options: FfcvOptions,
        spec: LoaderSpec,
        beton: Beton,
        classes: list[str],
        training: bool,
    ) -> None:
        super().__init__(_schedule(options, spec, beton, training))
        self._options, self._spec, self._beton, self._classes = options, spec, beton, classes
        self._normalized = PixelNormalizer(spec.device, spec.dtype, spec.normalize)
        on_cpu = spec.device.type == "cpu"
        self._table = _numpy(byte_table(spec.dtype, spec.normalize)) if on_cpu else None
        self._workers: _Workers | None = None

    def _read(self, epoch: int, first_step: int) -> Iterator[Batch]:
        if self._workers is None:
            self._workers = _Workers(self._options.workers, self._beton.path)
        batches = list(self.schedule.batches(epoch, first_step))
        started: deque[_Started] = deque()
        try:
            for step, indices in enumerate(batches):
                self._read_ahead(self._workers, batches[step : step + READ_AHEAD])
                started.append(self._start(self._workers, epoch, indices))
                if len(started) > self._options.prefetch:
                    yield self._finish(self._workers, started.popleft())
            while started:
                yield self._finish(self._workers, started.popleft())
        finally:
            for batch in started:
                batch.cancel()

    def close(self) -> None:
        """End the threads and close the file; a later iteration starts them anew."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _start(self, workers: _Workers, epoch: int, indices: Indices) -> _Started:
        spec, count = self._spec, len(indices)
        buffer, blocks = self._buffers(count)
        status = np.empty(count, np.uint8)
        samples = self._beton.samples.take(indices)
        views: Views = ffcv_decode.eval_views
        draws: tuple[Draws, ...] = ()
        if self.schedule.training:
            views = ffcv_decode.training_views
            draws = (draw(spec.seed, epoch, indices, len(spec.sizes), spec.flip),)
        outs = tuple(_numpy(block) for block in blocks)
        tasks = [
            workers.submit(
                views, samples, *draws, first, min(first + CHUNK, count), self._table, outs, status
            )
            for first in range(0, count, CHUNK)
        ]
        return _Started(indices, samples, buffer, blocks, status, tasks)

    def _buffers(self, count: int) -> tuple[Tensor | None, list[Tensor]]:
        """One (count, s, 3 * s) block per size: on the CPU of the compute dtype, where the threads write
        what the network reads; for a GPU bytes, views of one pinned buffer, which goes there at once.
        """
        shapes = [(count, s, 3 * s) for s in self._spec.sizes]
        if self._spec.device.type == "cpu":
            return None, [torch.empty(shape, dtype=self._spec.dtype) for shape in shapes]
        lengths = [math.prod(shape) for shape in shapes]
        buffer = torch.empty(sum(lengths), dtype=torch.uint8, pin_memory=True)
        blocks = zip(torch.split(buffer, lengths), shapes, strict=True)
        return buffer, [block.view(shape) for block, shape in blocks]

    def _finish(self, workers: _Workers, started: _Started) -> Batch:
        for task in started.tasks:
            task.result()
        if (started.status != FINE).any():
            raise self._explained(started)
        if not self._options.os_cache:
            workers.forget(started.samples)
        blocks = started.blocks
        labels = torch.from_numpy(self._beton.labels[started.indices])
        if started.buffer is not None:
            pixels = started.buffer.to(self._spec.device, non_blocking=True).view(-1, 3)
            numbers = self._normalized(pixels).view(-1)
            blocks = list(torch.split(numbers, [block.numel() for block in blocks]))
            labels = labels.pin_memory().to(self._spec.device, non_blocking=True)
        images = tuple(
            block.view(len(labels), s, s, 3).permute(0, 3, 1, 2)
            for s, block in zip(self._spec.sizes, blocks, strict=True)
        )
        return Batch(images, labels)

    def _explained(self, started: _Started) -> DataError:
        first = int(np.argmax(started.status != FINE))
        index = int(started.indices[first])
        reason = (
            "the file ends before it does"
            if started.status[first] == CUT_OFF
            else "its JPEG does not decode without fault"
        )
        return _broken(self._beton, index, self._classes[self._beton.labels[index]], reason)

    def _read_ahead(self, workers: _Workers, batches: list[Indices]) -> None:
        if isinstance(self.schedule, PageSchedule):
            workers.want(
                np.unique(self.schedule.pages[np.concatenate(batches)]), self._beton.page_size
            )


def _numpy(tensor: Tensor) -> NDArray[Any]:
    """The same memory; numpy has no bfloat16, its bits do."""
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    array: NDArray[Any] = bits.numpy()
    return array


def _schedule(options: FfcvOptions, spec: LoaderSpec, beton: Beton, training: bool) -> Schedule:
    schedule = schedule_for(spec, len(beton), training)
    if not training or options.order == "random":
        return schedule
    pages = (beton.samples.pointer // np.uint64(beton.page_size)).astype(np.int64)
    return PageSchedule(**vars(schedule), pages=pages)


@dataclass(frozen=True)
class _Started:
    """A batch in the works: `status` says of each sample how it went, once the tasks are done."""

    indices: Indices
    samples: Samples
    buffer: Tensor | None
    blocks: list[Tensor]
    status: NDArray[np.uint8]
    tasks: list[Future[None]]

    def cancel(self) -> None:
        for task in self.tasks:
            task.cancel()


class _Workers:
    """Threads that share an open file; each task borrows a decoder."""

    def __init__(self, threads: int, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._decoders = deque(JpegDecoder() for _ in range(threads))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ffcv")
        self._wanted: set[int] = set()

    def submit(self, views: Views, *arguments: Any) -> Future[None]:
        return self._pool.submit(self._run, views, arguments)

    def _run(self, views: Views, arguments: tuple[Any, ...]) -> None:
        decoder = self._decoders.pop()
        try:
            views(self._file.fileno(), decoder.handle, *arguments)
        finally:
            self._decoders.append(decoder)

    def want(self, pages: NDArray[np.int64], page_size: int) -> None:
        """Have the operating system read these pages in the background, if they are new."""
        for page in set(pages.tolist()) - self._wanted:
            os.posix_fadvise(
                self._file.fileno(), page * page_size, page_size, os.POSIX_FADV_WILLNEED
            )
        self._wanted = set(pages.tolist())

    def forget(self, samples: Samples) -> None:
        """Have the operating system drop these samples from its cache."""
        for pointer, size in zip(samples.pointer.tolist(), samples.size.tolist(), strict=True):
            os.posix_fadvise(self._file.fileno(), pointer, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._file.close()

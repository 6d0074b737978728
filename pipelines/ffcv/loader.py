"""Batches from .beton files: threads read, decode, crop and resize; the device normalises.

FFCV's own loader is not used, because it fails silently: a damaged JPEG leaves the pixels of an earlier
batch, an exception in its thread makes the consumer wait forever, its crops ignore the seed, and an epoch
that is left early keeps its thread. Its file format and its libraries are used. The files are checked before
anything is trained on them. `--order quasi-random` shuffles the pages of a file, and then the samples
within each gigabyte of pages.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.auto_augment import LANES, augment
from pipelines.batch import Batch, Loaders, LoaderSpec
from pipelines.ffcv import decode as ffcv_decode
from pipelines.ffcv.beton import (
    Beton,
    broken_sample,
    open_beton,
)
from pipelines.ffcv.decode import FINE, Job, Views
from pipelines.ffcv.options import FfcvOptions
from pipelines.ffcv.sidecar import Sidecar, check_sidecar, read_sidecar
from pipelines.ffcv.verify import reasons
from pipelines.host_batch import (
    HostBatch,
    allocate_blocks,
    as_array,
    as_images,
    check_sizes,
    iterate_finished,
    pixel_table,
)
from pipelines.normalize import PixelNormalizer
from pipelines.sampler import (
    AUGMENTATION_LANE,
    Indices,
    Schedule,
    ScheduledLoader,
    draw_crops,
    make_schedule,
    uniforms,
)
from pipelines.sources.options import NO_OPTIONS
from pipelines.sources.source import count_text
from pipelines.sources.splits import warn_of_lacking, warn_of_single_class
from pipelines.targets import Targets
from pipelines.utils.errors import DataError, RunError, UsageError, error_context
from pipelines.utils.location import local_path
from pipelines.utils.output import say
from pipelines.utils.reading import cannot_read, require_unchanged
from pipelines.utils.text import distinct, first_names
from pipelines.windows import Windows, quasi_random

READ_AHEAD = 8  # batches, in quasi-random order
# 1 GiB of FFCV's pages of 8 MiB: about 10,000 ImageNet photos are mixed, from 128 places of the file.
GROUP = 128


def open_loaders(options: FfcvOptions, spec: LoaderSpec, with_train: bool) -> Loaders:
    """Return the loaders of `ffcv.make_loaders`. Raises what it does."""
    with error_context("--data"):
        data = local_path(spec.data, ".beton files")
    if not data.is_dir():
        raise UsageError(f"--data: there is no folder {data}")
    if spec.splits != NO_OPTIONS:
        raise UsageError(
            "--val-data and --val-fraction: give them to rsnet convert; .beton files are split already"
        )
    check_sizes(spec)
    paths = [data / f"{split}.beton" for split in (("train", "val") if with_train else ("val",))]
    betons = [open_beton(path) for path in paths]
    sidecars = [_checked_sidecar(options, spec, beton) for beton in betons]
    classes = _common_classes(data, betons, sidecars)
    if spec.rank == 0:
        for beton in betons:
            say(f"{beton.path}: {count_text(len(beton), len(classes))}")
            is_train = beton.path.stem == "train"
            warn_of_lacking(beton.path, classes, beton.labels, is_train)
        if len(classes) == 1:
            warn_of_single_class(data, classes[0])
    loaders = [
        FfcvLoader(options, spec, beton, classes, training=beton.path.stem == "train")
        for beton in betons
    ]
    return Loaders(loaders[0] if with_train else None, loaders[-1], classes)


class FfcvLoader(ScheduledLoader):
    """Batches of one file. A sample that cannot be read raises DataError with its index."""

    pipeline = "FFCV"

    def __init__(
        self,
        options: FfcvOptions,
        spec: LoaderSpec,
        beton: Beton,
        classes: list[str],
        training: bool,
    ) -> None:
        super().__init__(spec.of_split(training), _schedule(options, spec, beton, training))
        self._options, self._beton, self._classes = options, beton, classes
        self._targets = Targets(spec, beton.labels, classes, training)
        self.sample_weights = self._targets.weights
        self._normalized = PixelNormalizer(spec.device, spec.dtype, spec.normalize)
        self._table = pixel_table(spec) if spec.device.type == "cpu" else None
        self._workers: _Workers | None = None
        self._copies: torch.cuda.Stream | None = None

    @property
    def sample_names(self) -> Sequence[str]:
        return [f"{self._beton.path}#{index}" for index in range(len(self._beton))]

    def _fingerprint(self) -> str:
        columns = self._beton.labels, self._beton.samples.size, self._beton.samples.height
        return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()

    def _read(self, epoch: int, first_step: int) -> Iterator[Batch]:
        if self._workers is None:
            self._workers = _Workers(self._options.workers, self._beton.path)
        workers = self._workers
        if self._beton.stamp is not None:
            require_unchanged(workers.file, self._beton.stamp, self._beton.path)
        batches = list(self.schedule.batches(epoch, first_step))
        rows = [self.schedule.rows(indices) for indices in batches]
        pages = _PageAdvice(self._options, workers, self._beton, rows)
        started = self._started(workers, epoch, batches, pages)
        for step, batch in enumerate(iterate_finished(started, ahead=self._options.prefetch)):
            pages.after(step)
            yield batch
            if self._workers is not workers:
                raise RuntimeError("the loader was closed while it was read")

    def close(self) -> None:
        """End the threads and close the file; a later iteration starts them again."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _started(
        self, workers: _Workers, epoch: int, batches: list[Indices], pages: _PageAdvice
    ) -> Iterator[HostBatch]:
        for step, indices in enumerate(batches):
            pages.before(step)
            yield self._start(workers, epoch, indices)

    def _start(self, workers: _Workers, epoch: int, indices: Indices) -> HostBatch:
        count, rows = len(indices), self.schedule.rows(indices)
        buffer, blocks = self._buffers(self._spec.sizes_in(epoch), count)
        status = np.empty(count, np.uint8)
        outs = tuple(as_array(block) for block in blocks)
        job = Job(self._beton.samples.take(rows), self._table, outs, status)
        write_views, arguments = self._view_writer(epoch, indices)

        def fill(first: int, last: int) -> None:
            write_views(workers.file, job, first, last, *arguments)

        finish = partial(self._finish, rows, buffer, blocks, status)
        return HostBatch(workers.pool, count, fill, finish)

    def _view_writer(self, epoch: int, indices: Indices) -> tuple[Views, tuple[Any, ...]]:
        """Return the function of `decode` that writes a batch's views, and its further arguments."""
        spec = self._spec
        if not self.schedule.training:
            return ffcv_decode.eval_views, ()
        crops = draw_crops(spec, epoch, indices)
        if spec.auto_augment is None:
            return ffcv_decode.training_views, (crops,)
        numbers = uniforms(spec.seed, epoch, indices, LANES, AUGMENTATION_LANE)
        kind, magnitude = spec.auto_augment, spec.ra_magnitude

        def augmented(crop: Image.Image, i: int) -> Image.Image:
            return augment(crop, kind, magnitude, numbers[i])

        return ffcv_decode.augmented_views, (crops, augmented)

    def _buffers(self, sizes: Sequence[int], count: int) -> tuple[Tensor | None, list[Tensor]]:
        """Allocate one (count, s, 3 * s) block per size, and return the pinned buffer behind them, if any.

        On the CPU the blocks have the compute dtype: the threads write what the network reads. For a
        GPU they are bytes, views of one pinned buffer, which is copied there at once.
        """
        if self._spec.device.type == "cpu":
            return None, allocate_blocks(sizes, count, self._spec.dtype)
        shapes = [(count, s, 3 * s) for s in sizes]
        lengths = [math.prod(shape) for shape in shapes]
        buffer = torch.empty(sum(lengths), dtype=torch.uint8, pin_memory=True)
        blocks = zip(torch.split(buffer, lengths), shapes, strict=True)
        return buffer, [block.view(shape) for block, shape in blocks]

    def _finish(
        self,
        rows: Indices,
        buffer: Tensor | None,
        blocks: list[Tensor],
        status: NDArray[np.uint8],
    ) -> Batch:
        """Make the batch from what the threads wrote.

        Raises DataError if a sample is broken, RunError if it could not be read.
        """
        if (status != FINE).any():
            raise self._broken(rows, status)
        if buffer is not None:
            pixels = self._on_device(buffer).view(-1, 3)
            numbers = torch.split(self._normalized(pixels).view(-1), [b.numel() for b in blocks])
            blocks = [n.view(b.shape) for n, b in zip(numbers, blocks, strict=True)]
        return Batch(as_images(blocks), *self._targets(rows))

    def _on_device(self, buffer: Tensor) -> Tensor:
        """Copy to the device on a separate stream, so that the copy overlaps with the previous step. On the
        step's own stream it would be a gap: 256 images at five sizes are 106 MB, 2 ms at 50 GB/s
        (calculated), 3 % of a ResNet-18's step on an H100.
        """
        device = self._spec.device
        if self._copies is None:
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._copies):
            copied = buffer.to(device, non_blocking=True)
        current.wait_stream(self._copies)
        copied.record_stream(current)  # or it would be given to a later copy while it is read
        return copied

    def _broken(self, rows: Indices, status: NDArray[np.uint8]) -> DataError | RunError:
        """Return the error for the first sample that is not FINE, which is read again to tell why."""
        index = int(rows[np.argmax(status != FINE)])
        (reason,) = reasons(self._beton, np.array([index]), workers=1)
        if reason is None:
            return cannot_read(self._beton.path, f"sample {index} was unreadable for a moment")
        return broken_sample(self._beton, index, self._classes[self._beton.labels[index]], reason)


def _checked_sidecar(options: FfcvOptions, spec: LoaderSpec, beton: Beton) -> Sidecar | None:
    """Return the file's sidecar; without one, decode every sample first, unless --trust is given.

    Raises DataError if the sidecar does not fit the file, or a sample is broken.
    """
    found = read_sidecar(beton.path)
    if found is not None:
        check_sidecar(found, beton)
        if found.skipped and spec.rank == 0:
            say(f"{beton.path}: {found.lacks}")
    elif not options.trust:
        if spec.rank == 0:
            say(
                f"warning: {beton.path} has no sidecar: checking all {len(beton)} samples "
                "(--trust leaves that out)",
                sys.stderr,
            )
        # Each node has its own copy, perhaps, of which its processes check all.
        ranks = spec.local_ranks
        share = np.arange(ranks.index(spec.rank), len(beton), len(ranks))
        for index, reason in zip(
            share.tolist(), reasons(beton, share, options.workers), strict=True
        ):
            if reason is not None:
                raise broken_sample(beton, index, str(beton.labels[index]), reason)
    return found


def _common_classes(data: Path, betons: list[Beton], sidecars: list[Sidecar | None]) -> list[str]:
    """Return the class names that all sidecars share, or numbers if there is no sidecar.

    Raises UsageError if they differ, DataError if a label has no class.
    """
    outputs = max(int(beton.labels.max()) + 1 for beton in betons)
    lists = [found.classes for found in sidecars if found is not None]
    if not lists:
        return [str(label) for label in range(outputs)]
    if any(classes != lists[0] for classes in lists):
        different = sorted(set(lists[0]) ^ set(lists[-1]))
        raise UsageError(
            f"--data: the classes of {data}/train.beton and {data}/val.beton differ"
            + (
                f": {first_names(list(map(distinct, different)))}"
                if different
                else " in their order"
            )
        )
    if outputs > len(lists[0]):
        raise DataError(f"{data}: there is a label {outputs - 1}, but {len(lists[0])} classes")
    return lists[0]


def _schedule(options: FfcvOptions, spec: LoaderSpec, beton: Beton, training: bool) -> Schedule:
    schedule = make_schedule(spec, len(beton), training, beton.labels)
    if not training or options.order == "random":
        return schedule
    return quasi_random(schedule, spec, Windows(beton.pages, GROUP))


class _Workers:
    """Threads that share an open file."""

    def __init__(self, threads: int, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="ffcv")

    @property
    def file(self) -> int:
        """The descriptor of the file."""
        return self._file.fileno()

    def advise(self, page: int, page_size: int, advice: int) -> None:
        """Tell the operating system how a page of the file will be used: a POSIX_FADV_ constant."""
        os.posix_fadvise(self.file, page * page_size, page_size, advice)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self._file.close()


class _PageAdvice:
    """Reads the pages of a file ahead of their use, and drops them from the page cache after it."""

    def __init__(
        self, options: FfcvOptions, workers: _Workers, beton: Beton, batches: list[Indices]
    ) -> None:
        self._workers, self._page_size = workers, beton.page_size
        self._wanted: dict[int, list[int]] = {}  # step -> pages to ask for
        self._done: dict[int, list[int]] = {}  # step -> pages that it is the last to need
        if options.order == "random":
            return
        pages = beton.pages
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for step, indices in enumerate(batches):
            for page in np.unique(pages[indices]).tolist():
                first.setdefault(page, max(0, step - READ_AHEAD))
                last[page] = step
        for page, step in first.items():
            self._wanted.setdefault(step, []).append(page)
        if not options.os_cache:
            for page, step in last.items():
                self._done.setdefault(step, []).append(page)

    def before(self, step: int) -> None:
        """Ask for the pages that step `step` + READ_AHEAD is the first to need."""
        for page in self._wanted.get(step, ()):
            self._workers.advise(page, self._page_size, os.POSIX_FADV_WILLNEED)

    def after(self, step: int) -> None:
        """Drop the pages that no later step needs."""
        for page in self._done.get(step, ()):
            self._workers.advise(page, self._page_size, os.POSIX_FADV_DONTNEED)

"""Batches from a .beton file: threads read, decode, crop and resize; the device normalises.

FFCV's own loader is not used, for what it does in silence: a damaged JPEG leaves the pixels of an earlier
batch, an exception in its thread makes the consumer wait for ever, its crops ignore the seed, and an epoch
that is left early keeps its thread. Its files and its libraries are.


train.beton and val.beton, checked before anything is trained on them.

The quasi-random order: shuffled by pages of a file, then within a gigabyte of pages."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch, Loaders, LoaderSpec
from pipelines.ffcv import decode as ffcv_decode
from pipelines.ffcv.beton import (
    Beton,
    Sidecar,
    broken_sample,
    check_sidecar,
    open_beton,
    read_sidecar,
)
from pipelines.ffcv.decode import CUT_OFF, FINE, Views
from pipelines.ffcv.options import FfcvOptions
from pipelines.ffcv.turbojpeg import JpegDecoder
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
from pipelines.sampler import Indices, Schedule, ScheduledLoader, crop_params, make_schedule
from pipelines.transforms import CropParams
from pipelines.utils.errors import DataError, UsageError

READ_AHEAD = 8  # batches, quasi-random order


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
        self._table = pixel_table(spec) if spec.device.type == "cpu" else None
        self._workers: _Workers | None = None

    def _fingerprint(self) -> str:
        columns = self._beton.labels, self._beton.samples.size, self._beton.samples.height
        return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()

    def _read(self, epoch: int, first_step: int) -> Iterator[Batch]:
        if self._workers is None:
            self._workers = _Workers(self._options.workers, self._beton.path)
        workers = self._workers
        batches = list(self.schedule.batches(epoch, first_step))
        pages = _PageAdvice(self._options, workers, self._beton, batches)
        works = self._started(workers, epoch, batches, pages)
        for step, batch in enumerate(iterate_finished(works, ahead=self._options.prefetch)):
            pages.after(step)
            yield batch
            if self._workers is not workers:
                raise RuntimeError("the loader was closed while it was read")

    def close(self) -> None:
        """End the threads and close the file; a later iteration starts them anew."""
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
        spec, count = self._spec, len(indices)
        buffer, blocks = self._buffers(count)
        status = np.empty(count, np.uint8)
        samples = self._beton.samples.take(indices)
        views: Views = ffcv_decode.eval_views
        draws: tuple[CropParams, ...] = ()
        if self.schedule.training:
            views = ffcv_decode.training_views
            draws = (crop_params(spec.seed, epoch, indices, len(spec.sizes), spec.flip),)
        outs = tuple(as_array(block) for block in blocks)

        def fill(first: int, last: int) -> None:
            workers.run(views, samples, *draws, first, last, self._table, outs, status)

        finish = partial(self._finish, indices, buffer, blocks, status)
        return HostBatch(workers.pool, count, fill, finish)

    def _buffers(self, count: int) -> tuple[Tensor | None, list[Tensor]]:
        """One (count, s, 3 * s) block per size: on the CPU of the compute dtype, where the threads write
        what the network reads; for a GPU bytes, views of one pinned buffer, which goes there at once.
        """
        if self._spec.device.type == "cpu":
            return None, allocate_blocks(self._spec, count)
        shapes = [(count, s, 3 * s) for s in self._spec.sizes]
        lengths = [math.prod(shape) for shape in shapes]
        buffer = torch.empty(sum(lengths), dtype=torch.uint8, pin_memory=True)
        blocks = zip(torch.split(buffer, lengths), shapes, strict=True)
        return buffer, [block.view(shape) for block, shape in blocks]

    def _finish(
        self,
        indices: Indices,
        buffer: Tensor | None,
        blocks: list[Tensor],
        status: NDArray[np.uint8],
    ) -> Batch:
        """The batch once the threads are done; `status` says of each sample how it went."""
        if (status != FINE).any():
            raise self._explained(indices, status)
        labels = torch.from_numpy(self._beton.labels[indices])
        if buffer is not None:
            pixels = buffer.to(self._spec.device, non_blocking=True).view(-1, 3)
            numbers = torch.split(self._normalized(pixels).view(-1), [b.numel() for b in blocks])
            blocks = [n.view(b.shape) for n, b in zip(numbers, blocks, strict=True)]
            labels = labels.pin_memory().to(self._spec.device, non_blocking=True)
        return Batch(as_images(blocks), labels)

    def _explained(self, indices: Indices, status: NDArray[np.uint8]) -> DataError:
        first = int(np.argmax(status != FINE))
        index = int(indices[first])
        reason = (
            "the file ends before it does"
            if status[first] == CUT_OFF
            else "its JPEG does not decode without fault"
        )
        return broken_sample(self._beton, index, self._classes[self._beton.labels[index]], reason)


def _schedule(options: FfcvOptions, spec: LoaderSpec, beton: Beton, training: bool) -> Schedule:
    schedule = make_schedule(spec, len(beton), training)
    if not training or options.order == "random":
        return schedule
    return PageSchedule(**vars(schedule), pages=beton.pages)


class _Workers:
    """Threads that share an open file; each task borrows a decoder."""

    def __init__(self, threads: int, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._decoders: deque[JpegDecoder] = deque()
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="ffcv")

    def run(self, views: Views, *arguments: Any) -> None:
        """Call it, on one of the pool's threads, with the file and a decoder."""
        try:
            decoder = self._decoders.pop()
        except IndexError:  # as many tasks run as decoders were made so far
            decoder = JpegDecoder()
        try:
            views(self._file.fileno(), decoder.handle, *arguments)
        finally:
            self._decoders.append(decoder)

    def advise(self, page: int, page_size: int, advice: int) -> None:
        """Tell the operating system what becomes of a page of the file."""
        os.posix_fadvise(self._file.fileno(), page * page_size, page_size, advice)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self._file.close()


class _PageAdvice:
    """Has the pages of a file read before they are needed, and dropped when they no longer are."""

    def __init__(
        self, options: FfcvOptions, workers: _Workers, beton: Beton, batches: list[Indices]
    ) -> None:
        self._workers, self._page_size = workers, beton.page_size
        self._wanted: dict[int, list[int]] = {}  # step -> pages that it is the first to need
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
        for page in self._wanted.get(step, ()):
            self._workers.advise(page, self._page_size, os.POSIX_FADV_WILLNEED)

    def after(self, step: int) -> None:
        for page in self._done.get(step, ()):
            self._workers.advise(page, self._page_size, os.POSIX_FADV_DONTNEED)


def open_loaders(options: FfcvOptions, spec: LoaderSpec, with_train: bool) -> Loaders:
    """As `ffcv.make_loaders`."""
    if not spec.data.is_dir():
        raise UsageError(f"--data: there is no folder {spec.data}")
    check_sizes(spec)
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


def _checked(options: FfcvOptions, spec: LoaderSpec, beton: Beton) -> Sidecar | None:
    """The file's sidecar, which agrees with it; without one every sample is decoded, unless trusted."""
    found = read_sidecar(beton.path)
    if found is not None:
        check_sidecar(found, beton.path, len(beton))
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
                raise broken_sample(beton, index, str(beton.labels[index]), reason)
    return found


def _common_classes(data: Path, betons: list[Beton], sidecars: list[Sidecar | None]) -> list[str]:
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


# 1 GiB of FFCV's pages of 8 MiB: about 10,000 ImageNet photos are mixed, from 128 places of the file.
GROUP = 128


@dataclass(frozen=True)
class PageSchedule(Schedule):
    """Reads a page of the file as a whole, and then soon all of its samples.

    The order depends on (seed, epoch) alone; all ranks share it, so that a machine reads a page once.
    """

    pages: NDArray[np.int64]  # (samples,) where each sample lies

    order_name = "quasi-random"

    def order(self, epoch: int) -> Indices:
        rng = np.random.default_rng((self.seed, epoch))
        _, page = np.unique(self.pages, return_inverse=True)
        group = rng.permutation(page.max() + 1) // GROUP
        return np.lexsort((rng.random(self.samples), group[page]))

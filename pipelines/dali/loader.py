"""Images by DALI: decode once, crop once, resize to every size.

On a GPU one DALI graph does it all. Without one DALI reads, decodes and crops, and threads of this module
resize, flip and normalise: DALI's own resize took three quarters of the time of its CPU graph, and is no
closer to PIL's. Order, crops, flips and augmentations come from `sampler`: DALI's own reader and random
generators depend on the number of shards, and cannot start in the middle of an epoch.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.auto_augment import LANES
from pipelines.batch import Batch, Loaders, LoaderSpec
from pipelines.dali.decoder import Decoder
from pipelines.dali.graphs import (
    build,
    crop_graph,
    eval_graph,
    image_graph,
    path_batch,
    release_memory,
    training_graph,
)
from pipelines.dali.options import DaliOptions
from pipelines.host_batch import (
    HostBatch,
    allocate_blocks,
    as_array,
    as_images,
    check_sizes,
    iterate_finished,
    pixel_table,
)
from pipelines.resize import resize
from pipelines.sampler import (
    AUGMENTATION_LANE,
    Indices,
    Schedule,
    ScheduledLoader,
    draw_crops,
    uniforms,
)
from pipelines.sources.source import Source, dali_error_line
from pipelines.sources.splits import (
    announce,
    announce_one,
    open_splits,
    warn_of_both,
)
from pipelines.targets import Targets
from pipelines.transforms import Rectangle, View, eval_view
from pipelines.utils.errors import DataError, RunError
from pipelines.utils.output import say
from pipelines.utils.thread_map import ordered_map
from pipelines.verify_report import skip_bad
from pipelines.windows import source_schedule

READ_TOGETHER = 16  # images that a thread reads at once

# Suffixes of formats of which `image_formats` refuses some.
DIFFERING = (".bmp", ".pgm", ".ppm", ".tif", ".tiff")

# What its allocators say (cuda_error.h): CUDA's own, and those of the pool, which name the bytes.
OUT_OF_MEMORY = re.compile(
    r"cudaErrorMemoryAllocation|CUDA allocation failed|Can't allocate \d+ bytes on device"
)

Taken = TypeVar("Taken", Batch, HostBatch)
Target = tuple[Tensor, Tensor | None]  # labels and weights of a batch


def open_loaders(options: DaliOptions, spec: LoaderSpec, with_train: bool = True) -> Loaders:
    """Return loaders over the splits of `spec.data`.

    Raises UsageError if it is malformed, and with --skip-bad if it was not verified.
    """
    speaks = spec.rank == 0

    def prepare(source: Source) -> Source:
        if speaks:
            announce_one(source)
        if options.skip_bad:
            return skip_bad(source, options.skip_bad_report, options.strict, verbose=speaks)
        if speaks:  # which were not verified
            _note_formats(source)
        return source

    train, val = open_splits(spec.data, spec.splits, with_train, prepare, options)
    if speaks and spec.splits.val_fraction is not None:
        announce(train, val)
    elif speaks:
        warn_of_both(train, val)
    return Loaders(
        DaliLoader(options, spec, train, training=True) if train else None,
        DaliLoader(options, spec, val, training=False),
        val.classes,
    )


def _note_formats(source: Source) -> None:
    """Say that DALI, which the files go to unseen, may take some for other pictures than PIL does."""
    # Path.suffix would take 3 s of a million names.
    suffixes = Counter(f".{name.rpartition('.')[2].lower()}" for name in source.each_name())
    kinds = [f"{suffix} {count}" for suffix, count in suffixes.items() if suffix in DIFFERING]
    if kinds:
        say(
            f"note: decoders do not agree on all of {', '.join(kinds)}; "
            f"{source.verify_command()} lists the images of which they see different pictures",
            sys.stderr,
        )


class DaliLoader(ScheduledLoader):
    """Batches of one split. A broken image raises DataError with its path."""

    pipeline = "DALI"

    def __init__(
        self, options: DaliOptions, spec: LoaderSpec, source: Source, training: bool
    ) -> None:
        spec = spec.of_split(training)
        super().__init__(spec, source_schedule(spec, source, training, options.window))
        self._source = source
        self._targets = Targets(spec, source.labels, source.classes, training, source.weights)
        self.sample_weights = self._targets.weights
        self._feed = _Feed(spec, source, self.schedule, options.workers)
        self._options = options
        self._on_gpu = spec.device.type == "cuda"
        if not self._on_gpu:
            check_sizes(spec)
        self._pipeline: Any = None
        self._resizer: Resizer | None = None
        self._started = False

    def _read(self, epoch: int, first_step: int) -> Iterator[Batch]:
        if self._on_gpu:
            return self._outputs(epoch, first_step, self._on_device)
        if self._resizer is None:
            self._resizer = Resizer(self._spec, self._options.workers)
        # One batch is resized while the next is awaited; DALI prepares those behind it.
        start = partial(self._resizer.start, self._spec.sizes_in(epoch))
        return iterate_finished(self._outputs(epoch, first_step, start), ahead=1)

    def _outputs(
        self, epoch: int, first_step: int, take: Callable[[tuple[Any, ...], Target], Taken]
    ) -> Iterator[Taken]:
        """Yield what `take` makes of the graph's outputs and the labels of each batch.

        Raises DataError, which names the image, if DALI cannot decode one.
        """
        self._drain()
        if self._pipeline is None:  # an evaluation loader that is never read costs no GPU memory
            self._pipeline = self._built()
        batches = self._expect(self._source, epoch, first_step)
        self._feed.start(iter(batches), epoch)
        for step in range(first_step, self.schedule.steps):
            try:
                if step == first_step:
                    self._started = True
                    self._pipeline.schedule_run()
                outputs = self._pipeline.share_outputs(**self._stream())
                taken = take(outputs, self._targets(self._feed.in_flight[0]))
                self._pipeline.release_outputs()
                self._pipeline.schedule_run()
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise  # of the GPU, from whatever was started before, and not of an image
            except (DataError, RunError):
                self.close()
                raise  # of the source, which names the image
            except RuntimeError as error:
                _raise_if_of_the_gpu(error, self._spec.device)
                suspects = [i for rows in self._feed.in_flight for i in rows.tolist()]
                self.close()  # DALI's pipelines do not survive an error
                reason_of = Decoder().reason_of
                raise self._source.explain_failure(suspects, error, reason_of) from error
            self._feed.in_flight.popleft()
            yield taken

    def _built(self) -> Any:
        if self._on_gpu:
            torch.cuda.empty_cache()  # DALI cannot ask for what PyTorch keeps of a training's peak
        try:
            return build(
                self._graph(), self._feed, self._options, self._spec, self._source.has_files
            )
        except RuntimeError as error:
            _raise_if_of_the_gpu(error, self._spec.device)
            raise

    def _graph(self) -> Any:
        if self._on_gpu:
            return training_graph if self.schedule.training else eval_graph
        return crop_graph if self.schedule.training else image_graph

    def _on_device(self, outputs: tuple[Any, ...], target: Target) -> Batch:
        return Batch(tuple(self._to_torch(output) for output in outputs), *target)

    @property
    def sample_names(self) -> Sequence[str]:
        return [self._source.locate(index) for index in range(len(self._source))]

    def _fingerprint(self) -> str:
        return self._source.fingerprint()

    def close(self) -> None:
        """End DALI's threads and free its memory; a later iteration builds the pipeline again."""
        if self._resizer is not None:
            self._resizer.close()
        self._pipeline, self._resizer, self._started = None, None, False
        self._feed.stop()
        self._source.stop()
        if self._on_gpu:
            release_memory()

    def _drain(self) -> None:
        """Discard the batches that an earlier, abandoned iteration had asked for, whatever became of them."""
        self._feed.stop()
        if not self._started:
            return
        try:
            while not self._pipeline.empty():
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()
        except RuntimeError:  # DALI's pipelines do not survive an error
            self._pipeline, self._started = None, False
            return
        self._pipeline.schedule_run()  # the feed is empty: this marks the end of the epoch
        self._pipeline.reset()

    def _stream(self) -> dict[str, Any]:
        # The outputs are ordered behind DALI's kernels on PyTorch's stream; the host does not wait.
        if self._spec.device.type == "cuda":
            return {"cuda_stream": torch.cuda.current_stream(self._spec.device)}
        return {}

    def _to_torch(self, output: Any) -> Tensor:
        """Turn DALI's (N, s, s, 3) into a channels-last (N, 3, s, s), without a copy."""
        return (
            torch.utils.dlpack.from_dlpack(output.as_tensor())
            .permute(0, 3, 1, 2)
            .to(self._spec.dtype)
        )


def _raise_if_of_the_gpu(error: RuntimeError, device: torch.device) -> None:
    """Raise an error of DALI's again if it is the GPU's: DALI has one type for all errors."""
    if OUT_OF_MEMORY.search(str(error)):
        raise torch.OutOfMemoryError(f"DALI: {dali_error_line(error)}") from error
    if re.search(r"CUDA (runtime|driver) API error", str(error)):
        raise error
    if device.type == "cuda":
        # After a kernel's fault each call fails, and the decoder says no more than that it cannot decode.
        torch.cuda.synchronize(device)


class Resizer:
    """Threads that resize, flip, normalise and cast the bytes that DALI's CPU graph gives."""

    def __init__(self, spec: LoaderSpec, threads: int) -> None:
        self._spec, self._table = spec, pixel_table(spec)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dali-resize")

    def start(self, sizes: Sequence[int], outputs: tuple[Any, ...], target: Target) -> HostBatch:
        """Start on the outputs of `crop_graph` or `image_graph`, whose memory the batch keeps alive.

        sizes: 0 for one that is not needed.
        """
        images, *flips = outputs
        count = len(target[0])
        blocks = allocate_blocks(sizes, count, self._spec.dtype)
        outs = [as_array(block) for block in blocks]
        mirror = flips[0].as_array() if flips else None
        return HostBatch(
            self._pool,
            count,
            fill=partial(self._fill, images, mirror, outs),
            finish=lambda: Batch(as_images(blocks), *target),
        )

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _fill(
        self,
        images: Any,
        mirror: NDArray[np.int32] | None,
        outs: list[NDArray[Any]],
        first: int,
        last: int,
    ) -> None:
        """Write images `first` to `last` - 1 of a batch at every size.

        mirror: (N, S) of a training batch, whose images are crops; None for evaluation.
        """
        for i in range(first, last):
            pixels = np.asarray(images[i])  # .at(i) would copy
            height, width, _ = pixels.shape
            box, rows = Rectangle(0, 0, height, width), pixels.reshape(height, 3 * width)
            for k, out in enumerate(outs):
                size = out.shape[1]
                if size == 0:
                    continue
                if mirror is None:
                    view, flip = eval_view(height, width, size), False
                else:
                    view, flip = View(size, size, 0, 0), bool(mirror[i, k])
                resize(rows, box, view, flip, self._table, out[i])


class _Feed:
    """Hands the graph one batch of images and random numbers a call, and knows which are in flight."""

    def __init__(self, spec: LoaderSpec, source: Source, schedule: Schedule, threads: int) -> None:
        self._spec, self._source, self._schedule = spec, source, schedule
        self._threads = threads
        self._batches: Generator[tuple[Indices, list[Any]]] | None = None
        self._epoch = 0
        self.in_flight: deque[Indices] = deque()  # rows handed to DALI, not yet taken from it

    def start(self, batches: Iterator[Indices], epoch: int) -> None:
        """Hand out these batches from the next call on."""
        self._batches, self._epoch = self._read(batches), epoch

    def stop(self) -> None:
        """Hand out no more batches, and forget those in flight."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None
        self.in_flight.clear()

    def __call__(self) -> list[Any]:
        """Return the next batch as DALI's external source wants it, or raise StopIteration."""
        if self._batches is None:
            raise StopIteration
        indices, images = next(self._batches)
        self.in_flight.append(self._schedule.rows(indices))
        if not self._schedule.training:
            return [images]
        spec = self._spec
        params = draw_crops(spec, self._epoch, indices)
        numbers = [params.area, params.ratio, params.position, params.flip.astype(np.int32)]
        if spec.auto_augment is not None:
            counters = spec.seed, self._epoch, indices
            numbers.append(uniforms(*counters, LANES, AUGMENTATION_LANE))
        return [images, *map(np.ascontiguousarray, numbers)]

    def _read(self, batches: Iterator[Indices]) -> Generator[tuple[Indices, list[Any]]]:
        """Yield each batch with its paths, which DALI reads, or with its images' bytes."""
        if self._source.has_files:
            for indices in batches:
                rows = self._schedule.rows(indices).tolist()
                yield indices, path_batch([self._source.locate(i) for i in rows])
            return
        begun: deque[Indices] = deque()

        def parts() -> Iterator[Indices]:
            # Not whole batches, of which threads would read ahead many: GBs.
            for indices in batches:
                begun.append(indices)
                yield from np.split(indices, range(READ_TOGETHER, len(indices), READ_TOGETHER))

        found: list[Any] = []
        # The next batch is read while the device computes this one.
        ahead = 2 * -(-self._spec.batch_size // READ_TOGETHER)
        read = ordered_map(self._encoded, parts(), self._threads, self._source.stop, ahead)
        with closing(read) as encoded:
            for part in encoded:
                found += part
                if len(found) == len(begun[0]):
                    yield begun.popleft(), found
                    found = []

    def _encoded(self, indices: Indices) -> list[Any]:
        rows = self._schedule.rows(indices).tolist()
        return [np.frombuffer(self._source.read_or_explain(i), np.uint8) for i in rows]

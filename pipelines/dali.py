"""DALI: decode once, crop once, resize to every size. On the GPU where there is one, else on the CPU.

Order, crops, flips and augmentations come from `sampling`; DALI reads, decodes and computes. Its own
reader and generators are not used, because they depend on the number of shards and cannot start in
mid-epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch, Loaders, LoaderSpec
from pipelines.dali_decode import Decoder
from pipelines.dali_graph import (
    AUGMENTATION_NUMBERS,
    DaliOptions,
    build,
    eval_graph,
    path_batch,
    training_graph,
)
from pipelines.folder import ImageFolder, explain_failure, scan_train_val
from pipelines.sampling import (
    AUGMENTATION_LANE,
    Indices,
    ScheduledLoader,
    draw,
    schedule_for,
    uniforms,
)
from pipelines.verified import skip_bad

__all__ = ["DaliLoader", "DaliOptions", "make_loaders"]


def make_loaders(options: DaliOptions, spec: LoaderSpec, with_train: bool = True) -> Loaders:
    """Loaders over `spec.data`/train and /val.

    Raises UsageError on a malformed folder, and with --skip-bad on one that was not verified.
    """
    train, val = scan_train_val(spec.data, with_train)
    if options.skip_bad:
        train, val = skip_bad(train, val, options.skip_bad_report, say=spec.rank == 0)
    return Loaders(
        DaliLoader(options, spec, train, training=True) if train else None,
        DaliLoader(options, spec, val, training=False),
        val.classes,
    )


class DaliLoader(ScheduledLoader):
    """Batches of one image folder. A broken image raises DataError with its path."""

    def __init__(
        self, options: DaliOptions, spec: LoaderSpec, folder: ImageFolder, training: bool
    ) -> None:
        super().__init__(schedule_for(spec, len(folder.paths), training))
        self._spec, self._folder = spec, folder
        self._feed = _Feed(spec, folder, training)
        self._options = options
        self._pipeline: Any = None
        self._started = False

    def _read(self, epoch: int, first_step: int) -> Iterator[Batch]:
        if self._pipeline is None:  # an evaluation loader that is never read costs no GPU memory
            graph = training_graph if self.schedule.training else eval_graph
            self._pipeline = build(graph, self._feed, self._options, self._spec)
        self._drain()
        self._feed.start(self.schedule.batches(epoch, first_step), epoch)
        for step in range(first_step, self.schedule.steps):
            try:
                if step == first_step:
                    self._started = True
                    self._pipeline.schedule_run()
                outputs = self._pipeline.share_outputs(**self._stream())
                images = tuple(self._to_torch(output) for output in outputs)
                self._pipeline.release_outputs()
                self._pipeline.schedule_run()
            except RuntimeError as error:
                suspects = [p for indices in self._feed.in_flight for p in self._paths(indices)]
                self.close()  # DALI's pipelines do not survive an error
                reason_of = Decoder().reason
                raise explain_failure(suspects, error, self._spec.data, reason_of) from error
            indices = self._feed.in_flight.popleft()
            yield Batch(images, self._labels(indices))

    def _fingerprint(self) -> str:
        return self._folder.fingerprint()

    def close(self) -> None:
        """End DALI's threads and free its memory; a later iteration builds it anew."""
        self._pipeline, self._started = None, False
        self._feed.stop()

    def _drain(self) -> None:
        """Throw away what an earlier, abandoned iteration had asked for."""
        self._feed.stop()
        if not self._started:
            return
        while not self._pipeline.empty():
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()
        self._pipeline.schedule_run()  # the feed is empty: this marks the end of the epoch
        self._pipeline.reset()

    def _labels(self, indices: Indices) -> Tensor:
        labels = torch.from_numpy(self._folder.labels[indices])
        if self._spec.device.type == "cuda":
            labels = labels.pin_memory()  # a copy from pageable memory would not be asynchronous
        return labels.to(self._spec.device, non_blocking=True)

    def _paths(self, indices: Indices) -> list[str]:
        return [self._folder.paths[i] for i in indices]

    def _stream(self) -> dict[str, Any]:
        # The outputs are ordered behind DALI's kernels on PyTorch's stream; the host does not wait.
        if self._spec.device.type == "cuda":
            return {"cuda_stream": torch.cuda.current_stream(self._spec.device)}
        return {}

    def _to_torch(self, output: Any) -> Tensor:
        """(N, s, s, 3) of DALI -> (N, 3, s, s) that is channels-last, without a copy."""
        return (
            torch.utils.dlpack.from_dlpack(output.as_tensor())
            .permute(0, 3, 1, 2)
            .to(self._spec.dtype)
        )


class _Feed:
    """Hands the graph one batch of paths and random numbers a call; knows which are in the works."""

    def __init__(self, spec: LoaderSpec, folder: ImageFolder, training: bool) -> None:
        self._spec, self._folder, self._training = spec, folder, training
        self.stop()

    _batches: Iterator[Indices]

    def start(self, batches: Iterator[Indices], epoch: int) -> None:
        self._batches, self._epoch = batches, epoch

    def stop(self) -> None:
        self._batches = iter(())
        self._epoch = 0
        self.in_flight: deque[Indices] = deque()

    def __call__(self) -> list[Any]:
        indices = next(self._batches)
        self.in_flight.append(indices)
        paths = path_batch([self._folder.paths[i] for i in indices])
        if not self._training:
            return [paths]
        spec = self._spec
        draws = draw(spec.seed, self._epoch, indices, len(spec.sizes), spec.flip)
        numbers = [draws.area, draws.ratio, draws.position, draws.flip.astype(np.int32)]
        if spec.auto_augment is not None:
            counters = spec.seed, self._epoch, indices
            numbers.append(uniforms(*counters, AUGMENTATION_NUMBERS, AUGMENTATION_LANE))
        return [paths, *map(np.ascontiguousarray, numbers)]

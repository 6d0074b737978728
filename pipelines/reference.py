"""The reference that the fast pipelines are tested against: torchvision, PIL and a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from pipelines.auto_augment import LANES, augment
from pipelines.batch import Batch, Loaders, LoaderSpec
from pipelines.image_formats import decode_error, decode_rgb, memory_errors
from pipelines.image_io import eval_image
from pipelines.normalize import PixelNormalizer
from pipelines.sampler import (
    AUGMENTATION_LANE,
    ScheduledLoader,
    draw_crops,
    uniforms,
)
from pipelines.sources.source import Source
from pipelines.sources.splits import open_splits
from pipelines.targets import Targets
from pipelines.transforms import random_resized_crop
from pipelines.utils.errors import DataError, RunError
from pipelines.windows import source_schedule


@dataclass(frozen=True)
class ReferenceOptions:
    """Reading with torchvision and PIL."""

    workers: int = 0
    """Processes that read and decode; 0 decodes in the training process."""

    window: int | None = None
    """Tar shards that are mixed; None for all samples."""


def make_loaders(options: ReferenceOptions, spec: LoaderSpec, with_train: bool = True) -> Loaders:
    """Return loaders over the splits of `spec.data`. Raises UsageError if it is malformed."""
    train, val = open_splits(spec.data, spec.splits, with_train)
    return Loaders(
        ReferenceLoader(options, spec, train, training=True) if train else None,
        ReferenceLoader(options, spec, val, training=False),
        val.classes,
    )


class ReferenceLoader(ScheduledLoader):
    """Batches of one split. A broken image raises DataError with its path."""

    pipeline = "torchvision"

    def __init__(
        self, options: ReferenceOptions, spec: LoaderSpec, source: Source, training: bool
    ) -> None:
        schedule = source_schedule(spec, source, training, options.window)
        super().__init__(spec.of_split(training), schedule)
        self._options, self._source = options, source
        self._targets = Targets(spec, source.labels, source.classes, training, source.weights)
        self.sample_weights = self._targets.weights

    def _read(self, epoch: int, first_step: int) -> Iterator[Batch]:
        spec = self._spec
        normalized = PixelNormalizer(spec.device, spec.dtype, spec.normalize)
        batches = self._expect(self._source, epoch, first_step)
        loader = DataLoader(
            _MultiSizeDataset(spec, self._source, self.schedule.training, epoch),
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=self._options.workers,
            collate_fn=_collate,
            pin_memory=spec.device.type == "cuda",
        )
        for indices, images in zip(batches, loader, strict=True):
            if isinstance(images, DataError | RunError):
                raise images
            pixels = (x.to(spec.device, non_blocking=True) for x in images)
            yield Batch(
                tuple(normalized(x).permute(0, 3, 1, 2) for x in pixels),
                *self._targets(self.schedule.rows(indices)),
            )

    @property
    def sample_names(self) -> Sequence[str]:
        return [self._source.locate(index) for index in range(len(self._source))]

    def _fingerprint(self) -> str:
        return self._source.fingerprint()


class _MultiSizeDataset(Dataset[list[Tensor] | DataError | RunError]):
    """Gives one (s, s, 3) uint8 tensor per size of a sample, or the error to raise.

    The error is returned, because a DataLoader replaces the message of what a worker raises by a traceback.
    """

    def __init__(self, spec: LoaderSpec, source: Source, training: bool, epoch: int) -> None:
        self._spec, self._source, self._training, self._epoch = spec, source, training, epoch

    def __getitem__(self, index: int) -> list[Tensor] | DataError | RunError:
        source, row = self._source, index % len(self._source)
        try:
            data = source.read(row)
            with memory_errors(source.locate(row)):
                rgb = decode_rgb(data)
        except DataError as error:
            return source.explain_failure([row], error, decode_error)
        except RunError as error:
            return error
        views = self._training_views(rgb, index) if self._training else self._eval_views(rgb)
        return [torch.from_numpy(np.array(view)) for view in views]

    def _training_views(self, image: Image.Image, index: int) -> Iterator[Image.Image]:
        spec = self._spec
        params = draw_crops(spec, self._epoch, np.array([index]))
        rectangle = random_resized_crop(image.height, image.width, params, 0)
        crop = self._augmented(F.crop(image, *rectangle), index)
        for size, flip in zip(spec.all_sizes, params.flip[0], strict=True):
            view = F.resize(crop, [size, size], InterpolationMode.BILINEAR)
            yield F.hflip(view) if flip else view

    def _augmented(self, crop: Image.Image, index: int) -> Image.Image:
        spec = self._spec
        if spec.auto_augment is None:
            return crop
        numbers = uniforms(spec.seed, self._epoch, np.array([index]), LANES, AUGMENTATION_LANE)
        return augment(crop, spec.auto_augment, spec.ra_magnitude, numbers[0])

    def _eval_views(self, image: Image.Image) -> Iterator[Image.Image]:
        for size in self._spec.sizes:
            yield eval_image(image, size)


def _collate(
    samples: list[list[Tensor] | DataError | RunError],
) -> list[Tensor] | DataError | RunError:
    """Stack the samples to (N, s, s, 3) per size, or return the first error."""
    good = []
    for sample in samples:
        if isinstance(sample, DataError | RunError):
            return sample
        good.append(sample)
    return [torch.stack(size) for size in zip(*good, strict=True)]

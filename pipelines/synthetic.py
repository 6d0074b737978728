"""Random batches that are on the device already: to time the computation alone, and for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from pipelines.batch import Batch, Loaders, LoaderSpec
from pipelines.sampler import ScheduledLoader, make_schedule


@dataclass(frozen=True)
class SyntheticOptions:
    """Random images; nothing is read."""

    train_images: int = 1024
    """Training images of an epoch."""

    val_images: int = 256
    """Validation images."""

    classes: int = 1000
    """Number of classes."""


def make_loaders(options: SyntheticOptions, spec: LoaderSpec, with_train: bool = True) -> Loaders:
    """Return loaders of normal noise; a sample's label is its index modulo the classes."""

    def loader(images: int, training: bool) -> SyntheticLoader:
        return SyntheticLoader(spec, images, options.classes, training)

    return Loaders(
        loader(options.train_images, True) if with_train else None,
        loader(options.val_images, False),
        [str(c) for c in range(options.classes)],
    )


class SyntheticLoader(ScheduledLoader):
    """The same images in every batch, made once, so that only the labels cost time."""

    pipeline = "synthetic"

    def __init__(self, spec: LoaderSpec, images: int, classes: int, training: bool) -> None:
        # What is erased of images that are used again would stay so.
        own = replace(spec.of_split(training), random_erase=0.0)
        super().__init__(own, make_schedule(spec, images, training))
        self._classes = classes
        sizes = own.all_sizes
        generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self._images = tuple(
            torch.randn(spec.batch_size, s, s, 3, generator=generator, device=spec.device)
            .to(spec.dtype)
            .permute(0, 3, 1, 2)
            for s in sizes
        )

    def _read(self, epoch: int, first_step: int) -> Iterator[Batch]:
        for indices in self.schedule.batches(epoch, first_step):
            labels = torch.from_numpy(self.schedule.rows(indices) % self._classes)
            yield Batch(
                tuple(x[: len(indices)] for x in self._images),
                labels.to(self._spec.device, non_blocking=True),
            )

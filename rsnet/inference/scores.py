"""A release's logits of labelled images, computed once at each size: what tune and bench work on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.image_folder import ImageFolder, scan_folder
from pipelines.utils.errors import DataError, UsageError, error_context
from pipelines.utils.progress import ProgressBar
from pipelines.utils.thread_map import ordered_map
from rsnet.inference import preprocess as pictures
from rsnet.inference.classifier import SwitchableClassifier


@dataclass(frozen=True)
class LabelledLogits:
    """labels: (N,) int64. logits: by size, the largest first, (N, classes) float32; all on the CPU."""

    labels: Tensor
    logits: dict[int, Tensor]

    def halves(self, seed: int = 0) -> tuple[LabelledLogits, LabelledLogits]:
        """Every image in one of two halves by chance, the same for as many images and the same seed.

        Raises UsageError for less than two images.
        """
        if len(self.labels) < 2:
            raise UsageError("--data: at least 2 images are needed, as half of them are fitted to")
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self.labels)))
        middle = len(order) // 2
        return self._of(order[:middle]), self._of(order[middle:])

    def _of(self, rows: Tensor) -> LabelledLogits:
        return LabelledLogits(self.labels[rows], {s: z[rows] for s, z in self.logits.items()})


def find(data: Path, network: Mapping[str, Any]) -> ImageFolder:
    """The labelled images in `data`, or in its `val`, with labels in the order of the network's outputs.

    Raises UsageError if there are none, or the class folders are not the network's classes.
    """
    names: list[str] = network["classes"]
    nested = data / "val"
    with error_context("--data"):
        folder = scan_folder(nested if nested.is_dir() and "val" not in names else data)
    if not names and len(folder.classes) == network["num_classes"]:
        return folder  # in the order of the folders' names, as it was trained
    unknown, missing = set(folder.classes) - set(names), set(names) - set(folder.classes)
    for what, some in (("has a class", unknown), ("lacks the class", missing)):
        if some:
            raise UsageError(
                f"--data: {folder.root} {what} {min(some)!r}, other than the release"
                f" ({len(folder.classes)} classes there, {len(names)} here)"
            )
    output_of = {name: i for i, name in enumerate(names)}
    outputs = np.array([output_of[name] for name in folder.classes])
    return ImageFolder(folder.root, folder.classes, folder.paths, outputs[folder.labels])


def collect(classifier: SwitchableClassifier, folder: ImageFolder) -> LabelledLogits:
    """The logits of all images, each decoded once. They take 4 bytes x images x classes x sizes.

    Raises DataError, which names the image, for one that cannot be decoded, and for outputs that are
    not finite.
    """
    parts: dict[int, list[Tensor]] = {size: [] for size in classifier.sizes}
    with ProgressBar("evaluate", len(folder.paths)) as progress:
        images, done, read = _pixels(classifier, folder), 0, 0
        while batch := list(islice(images, classifier.batch_size)):
            for size, pixels in zip(classifier.sizes, zip(*batch, strict=True), strict=True):
                parts[size].append(classifier.logits(torch.stack(pixels), size).cpu())
            read += sum(map(os.path.getsize, folder.paths[done : done + len(batch)]))
            done += len(batch)
            progress.update(done, read, 0)
    logits = {size: torch.cat(some) for size, some in parts.items()}
    for size, values in logits.items():
        bad = (~values.isfinite().all(dim=1)).nonzero()
        if len(bad):
            path = folder.paths[int(bad[0])]
            raise DataError(f"{path}: the network's outputs at size {size} are not finite")
    return LabelledLogits(torch.from_numpy(folder.labels), logits)


def _pixels(classifier: SwitchableClassifier, folder: ImageFolder) -> Iterator[list[Tensor]]:
    """Each image's pixels at all sizes."""

    def prepare(path: str) -> list[Tensor]:
        image = classifier.decode(path)
        return [pictures.eval_pixels(image, size) for size in classifier.sizes]

    return ordered_map(prepare, folder.paths, threads=len(os.sched_getaffinity(0)))

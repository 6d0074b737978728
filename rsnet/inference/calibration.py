"""Calibration on labelled images: their logits at each size, temperatures, and the calibration error."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.sources.folder import ImageFolder, scan_folder
from pipelines.utils.errors import DataError, UsageError, error_context
from pipelines.utils.location import local_path
from pipelines.utils.output import say
from pipelines.utils.thread_map import ordered_map
from rsnet.evaluation.label_sets import match_classes
from rsnet.evaluation.metrics import calibration_error
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.inference.preprocess import eval_pixels

# A network that is never wrong would have temperature 0, one worse than chance an infinite one.
MAX_TEMPERATURE = 20.0

# Images done, and the bytes of their files.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class LabelledLogits:
    """labels: (N,) int64. logits: by size, the largest first, (N, classes) float32; all on the CPU."""

    labels: Tensor
    logits: dict[int, Tensor]

    def halves(self, seed: int = 0) -> tuple[LabelledLogits, LabelledLogits]:
        """Split the images at random into two halves, the same for as many images and the same seed.

        Raises UsageError for less than two images.
        """
        if len(self.labels) < 2:
            raise UsageError("--data: at least 2 images are needed, as half of them are fitted to")
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self.labels)))
        middle = len(order) // 2
        return self._rows(order[:middle]), self._rows(order[middle:])

    def _rows(self, rows: Tensor) -> LabelledLogits:
        return LabelledLogits(self.labels[rows], {s: z[rows] for s, z in self.logits.items()})


def find_labelled_images(data: str | Path, network: Mapping[str, Any]) -> ImageFolder:
    """Find the labelled images in `data`, or in its `val`; labels are indices of the network's outputs.

    network: "network" of a release's config.json. What is assumed where it does not name its classes is said.

    Raises UsageError if there are none, or the class folders are not the network's classes.
    """
    names: list[str] = network["classes"]
    with error_context("--data"):
        data = local_path(data, "these images")
        nested = data / "val"
        folder = scan_folder(nested if nested.is_dir() and "val" not in names else data)
    if not names:
        if len(folder.classes) != (number := network["num_classes"]):
            raise UsageError(
                f"--data: {folder.root} has {len(folder.classes)} classes, and the release {number} that it "
                "does not name"
            )
        labels = match_classes(folder.classes, names, number)
        say(f"note: {labels.how}", sys.stderr)
        return dataclasses.replace(folder, labels=labels.outputs.numpy()[folder.labels])
    unknown, missing = set(folder.classes) - set(names), set(names) - set(folder.classes)
    for what, some in (("has a class", unknown), ("lacks the class", missing)):
        if some:
            raise UsageError(
                f"--data: {folder.root} {what} {min(some)!a}, other than the release"
                f" ({len(folder.classes)} classes there, {len(names)} here)"
            )
    output_of = {name: i for i, name in enumerate(names)}
    outputs = np.array([output_of[name] for name in folder.classes])
    return dataclasses.replace(folder, labels=outputs[folder.labels])


def collect_logits(
    classifier: SwitchableClassifier, folder: ImageFolder, on_progress: OnProgress | None = None
) -> LabelledLogits:
    """Compute the logits of all images at all sizes; each image is decoded once.

    They take 4 bytes x images x classes x sizes.

    Raises DataError, which names the image, for one that cannot be decoded, and for outputs that are
    not finite.
    """
    parts: dict[int, list[Tensor]] = {size: [] for size in classifier.sizes}
    images, done, read = _pixels(classifier, folder), 0, 0
    while batch := list(islice(images, classifier.batch_size)):
        for size, pixels in zip(classifier.sizes, zip(*batch, strict=True), strict=True):
            parts[size].append(classifier.logits(torch.stack(pixels), size).cpu())
        read += sum(map(os.path.getsize, folder.paths[done : done + len(batch)]))
        done += len(batch)
        if on_progress is not None:
            on_progress(done, read)
    logits = {size: torch.cat(some) for size, some in parts.items()}
    for size, values in logits.items():
        bad = (~values.isfinite().all(dim=1)).nonzero()
        if len(bad):
            path = folder.paths[int(bad[0])]
            raise DataError(f"{path}: the network's outputs at size {size} are not finite")
    return LabelledLogits(torch.from_numpy(folder.labels), logits)


def _pixels(classifier: SwitchableClassifier, folder: ImageFolder) -> Iterator[list[Tensor]]:
    """Yield each image's pixels at all sizes."""

    def prepare(path: str) -> list[Tensor]:
        image = classifier.decode(path)
        return [eval_pixels(image, size) for size in classifier.sizes]

    return ordered_map(prepare, folder.paths, threads=len(os.sched_getaffinity(0)))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature in [1/20, 20] by which to divide logits for the least cross-entropy.

    logits: (N, classes) float32. labels: (N,) int64. (Guo et al. 2017: On Calibration of Modern Neural
    Networks, section 4.2.)
    """
    position = torch.zeros((), requires_grad=True)
    lbfgs = torch.optim.LBFGS([position], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        value = F.cross_entropy(logits / _temperature(position), labels)
        (position.grad,) = torch.autograd.grad(value, position)
        return value

    lbfgs.step(loss)  # type: ignore[no-untyped-call]
    return _temperature(position).item()


def _temperature(position: Tensor) -> Tensor:
    """Map any position into the limits; 0 to 1."""
    return (math.log(MAX_TEMPERATURE) * position.tanh()).exp()


def expected_calibration_error(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Return `calibration_error` of the softmax of logits, (N, classes), over a temperature; labels: (N,)."""
    confidence, answers = (logits / temperature).softmax(dim=1).max(dim=1)
    return calibration_error(confidence, answers == labels)

"""Cascades: an image goes from one size to the next for as long as the network is unsure of it.

`run_cascade` computes one; `write_tuned` and `read_tuned` keep what `rsnet tune` found in tuned.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from PIL import Image
from torch import Tensor

from pipelines.utils.atomic_io import atomic_write_json
from pipelines.utils.errors import DataError, UsageError
from pipelines.utils.schema import parsing
from rsnet.inference.preprocess import eval_pixels
from rsnet.release import package as release

TUNED_FILE, TUNED_FORMAT = release.TUNED, 1

# Fitted temperatures are from 1/20 to 20; values far from those make NaN of logits.
MIN_TEMPERATURE = 1e-3

Key = TypeVar("Key")


class CascadeStage(NamedTuple):
    """A size; an image whose most likely class has a probability below `threshold` goes to the next."""

    size: int
    threshold: float = 0.0


# The sizes that an image goes through; the last one decides, whatever its threshold.
Cascade = tuple[CascadeStage, ...]


@dataclass(frozen=True)
class Prediction:
    """Top classes of one image.

    classes, probabilities: the most likely classes' names and softmax outputs in [0, 1], the most likely
    first; calibrated only if the call asked for what was tuned. A class without a name goes by its index.
    size: the resolution that decided.
    ms: milliseconds of the image's batch over the images in it, from uint8 pixels on the host to
    probabilities there, summed over the sizes that it went through; without decoding and resizing.
    """

    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    size: int
    ms: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, classes and probabilities in pairs under "top"."""
        pairs = zip(self.classes, self.probabilities, strict=True)
        top = [{"class": name, "probability": value} for name, value in pairs]
        return {"size": self.size, "ms": self.ms, "top": top}


# A batch of (s, s, 3) uint8 pixels, and s.
Predict = Callable[[list[Tensor], int], list[Prediction]]


@dataclass(frozen=True)
class _Waiting(Generic[Key]):
    """An image on its way to a forward; ms: time spent at the sizes before.

    pixels: (s, s, 3) uint8. image: None where no larger size may follow, as decoded images are large.
    """

    key: Key
    image: Image.Image | None
    pixels: Tensor
    ms: float


def run_cascade(
    images: Iterable[tuple[Key, Image.Image]], cascade: Cascade, predict: Predict, batch_size: int
) -> Iterator[tuple[Key, Prediction]]:
    """Yield predictions of decoded images, under their keys, as they are decided.

    Up to two batches of decoded images wait at each size but the last.
    """
    waiting: list[list[_Waiting[Key]]] = [[] for _ in cascade]
    for key, image in images:
        waiting[0].append(_waiting(key, image, cascade, 0, 0.0))
        yield from _compute(waiting, cascade, predict, batch_size, batch_size)
    yield from _compute(waiting, cascade, predict, batch_size, 1)


def _compute(
    waiting: list[list[_Waiting[Key]]],
    cascade: Cascade,
    predict: Predict,
    batch_size: int,
    fewest: int,
) -> Iterator[tuple[Key, Prediction]]:
    """Compute at each stage while at least `fewest` images wait there; unsure ones wait at the next."""
    for stage, (size, threshold) in enumerate(cascade):
        while len(waiting[stage]) >= fewest:
            batch = waiting[stage][:batch_size]
            del waiting[stage][:batch_size]
            predictions = predict([one.pixels for one in batch], size)
            for one, prediction in zip(batch, predictions, strict=True):
                ms = one.ms + prediction.ms
                if one.image is not None and prediction.probabilities[0] < threshold:
                    next_ = _waiting(one.key, one.image, cascade, stage + 1, ms)
                    waiting[stage + 1].append(next_)
                else:
                    yield one.key, replace(prediction, ms=ms)


def _waiting(
    key: Key, image: Image.Image, cascade: Cascade, stage: int, ms: float
) -> _Waiting[Key]:
    pixels = eval_pixels(image, cascade[stage].size)
    return _Waiting(key, image if stage + 1 < len(cascade) else None, pixels, ms)


@dataclass(frozen=True)
class Tuned:
    """Content of tuned.json. temperatures: by size, logits are divided by them. cascade: smallest first."""

    temperatures: dict[int, float]
    cascade: Cascade


def write_tuned(
    folder: str | Path, sha256: str, tuned: Tuned, notes: Mapping[str, Any], prefix: str = ""
) -> None:
    """Write tuned.json into a release, in place of an earlier one. Raises OSError.

    sha256: of the release's weights. notes: further fields. prefix: of the file's name.
    """
    content = {
        "format": TUNED_FORMAT,
        "sha256": sha256,
        "temperatures": {str(size): value for size, value in tuned.temperatures.items()},
        "cascade": [stage._asdict() for stage in tuned.cascade],
    }
    atomic_write_json(Path(folder) / (prefix + TUNED_FILE), content | dict(notes))


def read_tuned(folder: str | Path, sha256: str, sizes: Sequence[int], prefix: str = "") -> Tuned:
    """Read tuned.json of the release in `folder`, whose weights have this SHA-256.

    Raises UsageError if there is none; DataError, in one line, if the file is damaged or of other weights.
    """
    path, advice = Path(folder) / (prefix + TUNED_FILE), "run `python -m rsnet tune` again"
    if not path.is_file():
        raise UsageError(f"there is no {path}; `python -m rsnet tune` writes it")
    with parsing(path, advice):
        content = json.loads(path.read_bytes())
        is_known, other = content["format"] == TUNED_FORMAT, content["sha256"] != sha256
    if other:  # perhaps of other sizes, too
        raise DataError(f"{path} is of other weights; {advice}")
    with parsing(path, advice):
        tuned = Tuned(
            {size: float(content["temperatures"][str(size)]) for size in sizes},
            tuple(
                CascadeStage(index(s["size"]), float(s["threshold"])) for s in content["cascade"]
            ),
        )
    if not (is_known and _is_valid(tuned, sizes)):
        raise DataError(f"{path} is damaged, or of another version; {advice}")
    return tuned


def _is_valid(tuned: Tuned, sizes: Sequence[int]) -> bool:
    """Check sizes and ranges; NaN is in no range."""
    stages = [stage.size for stage in tuned.cascade]
    return (
        len(stages) > 0
        and set(stages) <= set(sizes)
        and stages == sorted(set(stages))
        and all(0 <= stage.threshold <= 1 for stage in tuned.cascade)
        and all(MIN_TEMPERATURE <= t <= 1 / MIN_TEMPERATURE for t in tuned.temperatures.values())
    )

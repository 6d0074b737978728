"""A cascade: images climb from one size to the next as long as the network is unsure of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

from PIL import Image
from torch import Tensor

from rsnet.inference import preprocess as pictures

Key = TypeVar("Key")


class CascadeStage(NamedTuple):
    """A size of a ladder; an image whose most likely class is below `threshold` goes on to the next."""

    size: int
    threshold: float = 0.0


# The sizes that an image goes through; the last one decides, whatever its threshold.
Cascade = tuple[CascadeStage, ...]


@dataclass(frozen=True)
class Prediction:
    """What the network says of one image.

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


# A batch of (s, s, 3) uint8 pixels, and s.
Predict = Callable[[list[Tensor], int], list[Prediction]]


@dataclass(frozen=True)
class _Waiting(Generic[Key]):
    """An image on its way to a forward; ms: what the sizes before took.

    pixels: (s, s, 3) uint8. image: None where no larger size may follow, as decoded images are large.
    """

    key: Key
    image: Image.Image | None
    pixels: Tensor
    ms: float


def run_cascade(
    images: Iterable[tuple[Key, Image.Image]], ladder: Cascade, predict: Predict, batch_size: int
) -> Iterator[tuple[Key, Prediction]]:
    """Predictions of decoded images, under their keys, when they are decided.

    Up to two batches of decoded images wait at each size but the last.
    """
    waiting: list[list[_Waiting[Key]]] = [[] for _ in ladder]
    for key, image in images:
        waiting[0].append(_waiting(key, image, ladder, 0, 0.0))
        yield from _compute(waiting, ladder, predict, batch_size, batch_size)
    yield from _compute(waiting, ladder, predict, batch_size, 1)


def _compute(
    waiting: list[list[_Waiting[Key]]],
    ladder: Cascade,
    predict: Predict,
    batch_size: int,
    fewest: int,
) -> Iterator[tuple[Key, Prediction]]:
    """Compute at each size as long as there wait `fewest` images; the unsure wait at the next."""
    for level, (size, threshold) in enumerate(ladder):
        while len(waiting[level]) >= fewest:
            batch = waiting[level][:batch_size]
            del waiting[level][:batch_size]
            predictions = predict([one.pixels for one in batch], size)
            for one, prediction in zip(batch, predictions, strict=True):
                ms = one.ms + prediction.ms
                if one.image is not None and prediction.probabilities[0] < threshold:
                    next_ = _waiting(one.key, one.image, ladder, level + 1, ms)
                    waiting[level + 1].append(next_)
                else:
                    yield one.key, replace(prediction, ms=ms)


def _waiting(key: Key, image: Image.Image, ladder: Cascade, level: int, ms: float) -> _Waiting[Key]:
    pixels = pictures.eval_pixels(image, ladder[level].size)
    return _Waiting(key, image if level + 1 < len(ladder) else None, pixels, ms)

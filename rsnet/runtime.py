"""A released network at work: pictures in, class names out, at the size that a call asks for.

Needs torch, torchvision, safetensors, numpy and pillow alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.batch import PixelNormalizer, eval_view
from pipelines.errors import DataError, UsageError, first_line
from pipelines.picture import eval_picture, open_image
from rsnet import release
from rsnet.models.switchable import ResolutionSwitchable

# A path, a PIL image, uint8 as an (H, W, 3) array, or uint8 as a (3, H, W) tensor on any device.
Picture = str | Path | Image.Image | NDArray[np.uint8] | Tensor

# Takes 0.3 GB decoded. A file of kilobytes can claim more; no photo has more.
MOST_PIXELS = 100_000_000

Key = TypeVar("Key")


@dataclass(frozen=True)
class Prediction:
    """What the network says of one image.

    classes, probabilities: the most likely classes' names and softmax outputs in [0, 1], the most likely
    first. A class that the release has no name for goes by its index.
    size: the resolution that decided.
    ms: milliseconds of the image's batch over the images in it, from uint8 pixels on the host to
    probabilities there, summed over the sizes that it went through; without decoding and resizing.
    """

    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    size: int
    ms: float


@dataclass(frozen=True)
class _Waiting(Generic[Key]):
    """An image on its way to a forward; ms: what the sizes before took.

    pixels: (s, s, 3) uint8. image: None where no larger size may follow, as decoded images are large.
    """

    key: Key
    image: Image.Image | None
    pixels: Tensor
    ms: float


class SwitchableClassifier:
    """A release's network, whose size each call chooses: one set of weights, nothing is loaded anew.

    One thread at a time may use it, as the size is a state of the network.
    """

    def __init__(
        self,
        model: ResolutionSwitchable,
        network: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype | None,
        batch_size: int,
        top: int,
    ) -> None:
        """What `load` says; network: the description of `model` in config.json."""
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.sizes = model.sizes
        self._names, self._outputs = network["classes"], network["num_classes"]
        self._device, self._dtype = device, dtype
        self._batch_size, self._top = batch_size, min(top, self._outputs)
        self._normalize = PixelNormalizer(device, dtype or torch.float32, network["normalize"])

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
        top: int = 5,
    ) -> SwitchableClassifier:
        """The network of the release in `folder`.

        dtype: torch.bfloat16 computes under autocast; None in float32. batch_size: images a forward, at
        most. top: how many classes a prediction names.

        Raises what `release.read` does, and UsageError, a ValueError, for a device that is not there,
        another dtype, or numbers below 1.
        """
        if dtype not in (None, torch.bfloat16):
            raise UsageError(f"dtype {dtype}: give torch.bfloat16 or None")
        for name, number in (("batch_size", batch_size), ("top", top)):
            if number < 1:
                raise UsageError(f"{name} {number}: at least 1 is needed")
        place = _require_device(device)
        read = release.read(Path(folder))
        network = read.config["network"]
        model = release.built(read, network["sizes"])
        return cls(model, network, place, dtype, batch_size, top)

    def classify(
        self,
        images: Picture | Sequence[Picture],
        size: int | None = None,
        confidence: float | None = None,
    ) -> list[Prediction]:
        """One prediction per image, in their order, of one picture or a list or tuple of such.

        Pictures are prepared as in an evaluation: all of PIL's modes to RGB, EXIF's rotation left out.
        size: one of `sizes`; the largest if not given.
        confidence: in its place, a probability in (0, 1]: the smallest size comes first, and an image goes
        on to the next larger one as long as its most likely class is below that.

        Raises UsageError, a ValueError, for another size or confidence, no images, or what is no picture;
        DataError, which names the image, for one that cannot be decoded or is too large.
        """
        pictures = images if isinstance(images, list | tuple) else [cast(Picture, images)]
        if not pictures:
            raise UsageError("there are no images")
        decoded = ((i, self.decode(picture, f"image {i}")) for i, picture in enumerate(pictures))
        found = dict(self.stream(decoded, size, confidence))
        return [found[i] for i in range(len(pictures))]

    def decode(self, picture: Picture, name: str = "the image") -> Image.Image:
        """The RGB image of a picture. In an error it goes by its path, or else by `name`.

        Raises UsageError for what is no picture, DataError for one that cannot be decoded or is too large.
        """
        if isinstance(picture, str | Path):
            with _blamed(str(picture)), _open(picture) as image:
                return self._rgb(image)
        image = picture if isinstance(picture, Image.Image) else _from_array(picture, name)
        with _blamed(name):
            return self._rgb(image)

    def stream(
        self,
        images: Iterable[tuple[Key, Image.Image]],
        size: int | None = None,
        confidence: float | None = None,
    ) -> Iterator[tuple[Key, Prediction]]:
        """Predictions of decoded images, under the keys these came with; for more than memory holds.

        They come when they are decided: in the order of the images, unless `confidence` is given, when up
        to two batches of decoded images wait at each size but the largest.

        Raises what `classify` does.
        """
        return self._cascade(images, self._ladder(size, confidence), confidence)

    def _ladder(self, size: int | None, confidence: float | None) -> Sequence[int]:
        """The sizes that an image goes through."""
        if confidence is not None:
            if size is not None:
                raise UsageError("give a size or a confidence, not both")
            if not 0 < confidence <= 1:
                raise UsageError(f"confidence {confidence}: must be above 0, and 1 at most")
            return self.sizes[::-1]
        if size is None:
            return self.sizes[:1]
        if size not in self.sizes:
            known = " ".join(map(str, self.sizes))
            raise UsageError(f"size {size}: this network has {known}")
        return (size,)

    def _rgb(self, image: Image.Image) -> Image.Image:
        """Refuses a huge image before its pixels are read, and one too long to be resized."""
        if 0 in image.size:
            raise DataError("it has no pixels")
        resized = eval_view(image.height, image.width, self.sizes[0])
        if max(image.height * image.width, resized.height * resized.width) > MOST_PIXELS:
            raise DataError(
                f"{image.width} x {image.height} pixels are too many, or too long a row"
            )
        return image.convert("RGB")

    def _cascade(
        self,
        images: Iterable[tuple[Key, Image.Image]],
        ladder: Sequence[int],
        confidence: float | None,
    ) -> Iterator[tuple[Key, Prediction]]:
        waiting: list[list[_Waiting[Key]]] = [[] for _ in ladder]
        for key, image in images:
            waiting[0].append(_waiting(key, image, ladder, 0, 0.0))
            yield from self._climb(waiting, ladder, confidence, self._batch_size)
        yield from self._climb(waiting, ladder, confidence, 1)

    def _climb(
        self,
        waiting: list[list[_Waiting[Key]]],
        ladder: Sequence[int],
        confidence: float | None,
        fewest: int,
    ) -> Iterator[tuple[Key, Prediction]]:
        """Compute at each size as long as there wait `fewest` images; the unsure wait at the next."""
        for level, size in enumerate(ladder):
            while len(waiting[level]) >= fewest:
                batch = waiting[level][: self._batch_size]
                del waiting[level][: self._batch_size]
                predictions = self._predict([one.pixels for one in batch], size)
                for one, prediction in zip(batch, predictions, strict=True):
                    ms = one.ms + prediction.ms
                    unsure = confidence is not None and prediction.probabilities[0] < confidence
                    if unsure and one.image is not None:
                        next_ = _waiting(one.key, one.image, ladder, level + 1, ms)
                        waiting[level + 1].append(next_)
                    else:
                        yield one.key, replace(prediction, ms=ms)

    def _predict(self, pixels: list[Tensor], size: int) -> list[Prediction]:
        start = time.perf_counter()
        probabilities, classes = (t.tolist() for t in self._most_likely(torch.stack(pixels), size))
        ms = 1000 * (time.perf_counter() - start) / len(pixels)
        return [
            Prediction(tuple(map(self._name, indices)), tuple(values), size, ms)
            for values, indices in zip(probabilities, classes, strict=True)
        ]

    @torch.inference_mode()
    def _most_likely(self, pixels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """(N, s, s, 3) uint8 -> (N, top) probabilities and (N, top) classes."""
        images = self._normalize(pixels.to(self._device)).permute(0, 3, 1, 2)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            logits = self.model(images, size)
        values, indices = logits.float().softmax(dim=1).topk(self._top)
        return values, indices

    def _name(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else str(index)


def _from_array(picture: NDArray[np.uint8] | Tensor, name: str) -> Image.Image:
    if isinstance(picture, Tensor):
        layout, channels, byte = "(3, H, W)", 0, picture.dtype == torch.uint8
    elif isinstance(picture, np.ndarray):
        layout, channels, byte = "(H, W, 3)", 2, picture.dtype == np.uint8
    else:
        what = "a path, a PIL image, an array or a tensor"
        raise UsageError(f"{name} is a {type(picture).__name__}, must be {what}")
    shape = tuple(picture.shape)
    if not byte or len(shape) != 3 or shape[channels] != 3 or 0 in shape:
        raise UsageError(f"{name} is {picture.dtype} of shape {shape}, must be uint8 {layout}")
    if isinstance(picture, Tensor):
        picture = picture.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(picture)


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ... by format
        raise DataError(f"{name}: {first_line(error)}") from error


def _open(path: str | Path) -> Image.Image:
    with warnings.catch_warnings():
        # PIL's, of half as many pixels as it refuses; MOST_PIXELS is between.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return open_image(path)


def _waiting(
    key: Key, image: Image.Image, ladder: Sequence[int], level: int, ms: float
) -> _Waiting[Key]:
    pixels = torch.from_numpy(np.array(eval_picture(image, ladder[level])))
    return _Waiting(key, image if level + 1 < len(ladder) else None, pixels, ms)


def _require_device(device: str | torch.device) -> torch.device:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch without CUDA
        raise UsageError(f"device {device}: {first_line(error)}") from error
    return torch.device(device)

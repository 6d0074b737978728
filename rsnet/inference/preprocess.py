"""Pictures as callers have them, to RGB images that are safe to decode and to resize."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.image_io import eval_image, open_image
from pipelines.transforms import eval_view
from pipelines.utils.errors import DataError, UsageError, first_line

# A path, a PIL image, uint8 as an (H, W, 3) array, or uint8 as a (3, H, W) tensor on any device.
Picture = str | Path | Image.Image | NDArray[np.uint8] | Tensor

# Takes 0.3 GB decoded. A file of kilobytes can claim more; no photo has more.
MOST_PIXELS = 100_000_000


def decode(picture: Picture, name: str, size: int) -> Image.Image:
    """The RGB image of a picture. In an error it goes by its path, or else by `name`.

    size: the largest that it will be resized to for an evaluation.

    Raises UsageError for what is no picture, DataError for one that cannot be decoded or is too large.
    """
    if isinstance(picture, str | Path):
        with _blamed(str(picture)), _open(picture) as image:
            return _rgb(image, size)
    image = picture if isinstance(picture, Image.Image) else _from_array(picture, name)
    with _blamed(name):
        return _rgb(image, size)


def eval_pixels(image: Image.Image, size: int) -> Tensor:
    """What an evaluation looks at of an RGB image: (size, size, 3) uint8."""
    return torch.from_numpy(np.array(eval_image(image, size)))


def _rgb(image: Image.Image, size: int) -> Image.Image:
    """Refuses a huge image before its pixels are read, and one too long to be resized."""
    if 0 in image.size:
        raise DataError("it has no pixels")
    resized = eval_view(image.height, image.width, size)
    if max(image.height * image.width, resized.height * resized.width) > MOST_PIXELS:
        raise DataError(f"{image.width} x {image.height} pixels are too many, or too long a row")
    return image.convert("RGB")


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

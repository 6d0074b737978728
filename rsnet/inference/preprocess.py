"""Images as callers have them, to RGB images that are safe to decode and to resize."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.image_formats import DEFAULT_MAX_MEGAPIXELS, check_image, open_image, to_rgb
from pipelines.image_io import eval_image, images_below
from pipelines.transforms import eval_view
from pipelines.utils.errors import DataError, RunError, UsageError, first_line
from pipelines.utils.reading import read_file

# A path, a PIL image, uint8 as an (H, W, 3) array, or uint8 as a (3, H, W) tensor on any device.
ImageInput = str | Path | Image.Image | NDArray[np.uint8] | Tensor


def find_images(given: Sequence[str | Path]) -> list[str]:
    """Return the paths of images: those given, and those below the folders given, in order.

    Raises UsageError if there is nothing at a path, or no image at all.
    """
    paths: list[str] = []
    for path in map(Path, given):
        if not path.exists():
            raise UsageError(f"there is no file or folder {path}")
        paths += images_below(path) if path.is_dir() else [str(path)]
    if not paths:
        raise UsageError(f"there is no image in {' '.join(map(str, given)) or 'the command'}")
    return paths


def decode(source: ImageInput, name: str, size: int) -> Image.Image:
    """Decode an image to RGB. An error names its path, or else `name`.

    size: the largest that it will be resized to for an evaluation.

    Raises UsageError for what is no image, DataError for one that cannot be decoded or is too large.
    """
    if isinstance(source, str | Path):
        with _decode_errors(str(source)), open_image(read_file(source)) as image:
            return _to_rgb(image, size)
    image = source if isinstance(source, Image.Image) else _from_array(source, name)
    with _decode_errors(name):
        return _to_rgb(image, size)


def eval_pixels(image: Image.Image, size: int) -> Tensor:
    """Return the (size, size, 3) uint8 pixels of an RGB image that an evaluation sees."""
    return torch.from_numpy(np.array(eval_image(image, size)))


def _to_rgb(image: Image.Image, size: int) -> Image.Image:
    """Convert to RGB; refuse a huge image before its pixels are read, and one too long to be resized."""
    if 0 in image.size:
        raise DataError("it has no pixels")
    check_image(image)
    resized = eval_view(image.height, image.width, size)
    if resized.height * resized.width > 1e6 * DEFAULT_MAX_MEGAPIXELS:
        raise DataError(f"{image.width} x {image.height} pixels are too long a row")
    return to_rgb(image)


@contextmanager
def _decode_errors(name: str) -> Iterator[None]:
    try:
        yield
    except RunError as error:  # it names the path
        raise DataError(str(error)) from error
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ... by format
        raise DataError(f"{name}: {first_line(error)}") from error


def _from_array(array: NDArray[np.uint8] | Tensor, name: str) -> Image.Image:
    if isinstance(array, Tensor):
        layout, channels, byte = "(3, H, W)", 0, array.dtype == torch.uint8
    elif isinstance(array, np.ndarray):
        layout, channels, byte = "(H, W, 3)", 2, array.dtype == np.uint8
    else:
        what = "a path, a PIL image, an array or a tensor"
        raise UsageError(f"{name} is a {type(array).__name__}, must be {what}")
    shape = tuple(array.shape)
    if not byte or len(shape) != 3 or shape[channels] != 3 or 0 in shape:
        raise UsageError(f"{name} is {array.dtype} of shape {shape}, must be uint8 {layout}")
    if isinstance(array, Tensor):
        array = array.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)

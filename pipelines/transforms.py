"""Geometry that all pipelines share: the random crop of training, and the centre crop of evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipelines.batch import Flip

# Evaluation resizes the short side to int(size / 0.875) and takes the centre (ResNet, section 3.4).
EVAL_CROP_RATIO = 0.875


CROP_AREA = (0.08, 1.0)


CROP_RATIO = (3 / 4, 4 / 3)


CROP_TRIES = 10


class Rectangle(NamedTuple):
    top: int
    left: int
    height: int
    width: int


class View(NamedTuple):
    """A rectangle resized to height x width, of which a square at (top, left) is taken."""

    height: int
    width: int
    top: int
    left: int


class CropParams(NamedTuple):
    """The random numbers of N training samples, in the order in which the crop uses them."""

    area: NDArray[np.float64]  # (N, 10) shares of the image
    ratio: NDArray[np.float64]  # (N, 10) width / height
    position: NDArray[np.float64]  # (N, 2) top and left, as shares of the room that is left
    flip: NDArray[np.bool_]  # (N, S), one a size

    @staticmethod
    def lanes(sizes: int) -> int:
        return 2 * CROP_TRIES + 2 + sizes

    @classmethod
    def from_uniforms(cls, uniforms: NDArray[np.float64], flip: Flip) -> CropParams:
        """`uniforms`: (N, lanes(S)) in [0, 1)."""
        area, ratio, position, flips = np.split(
            uniforms, (CROP_TRIES, 2 * CROP_TRIES, 2 * CROP_TRIES + 2), axis=1
        )
        low, high = np.log(CROP_RATIO)
        if flip == "shared":
            flips = np.repeat(flips[:, :1], flips.shape[1], axis=1)
        return cls(
            area=CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * area,
            ratio=np.exp(low + (high - low) * ratio),
            position=position,
            flip=flips < 0.5,
        )


def random_resized_crop(height: int, width: int, draws: CropParams, sample: int) -> Rectangle:
    """The training crop of an image: the first of ten tries that fits, else the centre.

    Area 8 % to 100 % of the image, ratio 3/4 to 4/3 (log-uniform): Inception's crop (Szegedy et al.
    2015, section 6) as torchvision's RandomResizedCrop has it.
    """
    for attempt in range(CROP_TRIES):
        area, ratio = draws.area[sample, attempt], draws.ratio[sample, attempt]
        crop_w = math.floor(math.sqrt(area * (height * width) * ratio) + 0.5)
        crop_h = math.floor(math.sqrt(area * (height * width) / ratio) + 0.5)
        if 0 < crop_w <= width and 0 < crop_h <= height:
            top = math.floor(draws.position[sample, 0] * (height - crop_h + 1))
            left = math.floor(draws.position[sample, 1] * (width - crop_w + 1))
            return Rectangle(top, left, crop_h, crop_w)
    crop_h = min(height, math.floor(width / CROP_RATIO[0] + 0.5))
    crop_w = min(width, math.floor(height * CROP_RATIO[1] + 0.5))
    return Rectangle((height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w)


def eval_short_side(size: int) -> int:
    """Length of the short side before the centre crop of `size` pixels."""
    return int(size / EVAL_CROP_RATIO)


def eval_view(height: int, width: int, size: int) -> View:
    """The evaluation's picture of `size` x `size`, as torchvision's Resize and CenterCrop take it."""
    short = int(size / EVAL_CROP_RATIO)
    resized_h = max(short, short * height // width)
    resized_w = max(short, short * width // height)
    # round() goes to the even number from the middle, here as there.
    return View(resized_h, resized_w, round((resized_h - size) / 2), round((resized_w - size) / 2))

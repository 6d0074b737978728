"""Geometry that all pipelines share: the random crop of training, and the centre crop of evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipelines.batch import Flip

# The random crop of training: Inception's (Szegedy et al. 2015, section 6), with torchvision's numbers.
CROP_AREA = (0.08, 1.0)  # share of the image, uniform
CROP_RATIO = (3 / 4, 4 / 3)  # width / height, log-uniform
CROP_TRIES = 10

# Evaluation resizes the short side to int(size / 0.875) and takes the centre (ResNet, section 3.4).
EVAL_CROP_RATIO = 0.875

RESIZE_FILTER = "triangle, antialiased (PIL's BILINEAR)"


class Rectangle(NamedTuple):
    """A part of an image, in pixels."""

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
    """The random crops of N training samples, and their flips at S sizes."""

    area: NDArray[np.float64]  # (N, CROP_TRIES) in CROP_AREA
    ratio: NDArray[np.float64]  # (N, CROP_TRIES) in CROP_RATIO
    position: NDArray[np.float64]  # (N, 2) top and left, as shares of the margin around the crop
    flip: NDArray[np.bool_]  # (N, S)

    @staticmethod
    def lanes(sizes: int) -> int:
        """Return how many uniform numbers a sample takes."""
        return 2 * CROP_TRIES + 2 + sizes

    @classmethod
    def from_uniforms(cls, uniforms: NDArray[np.float64], flip: Flip) -> CropParams:
        """Make them from `uniforms`, (N, lanes(S)) in [0, 1)."""
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


def random_resized_crop(height: int, width: int, params: CropParams, sample: int) -> Rectangle:
    """Return the training crop of an image, as torchvision's RandomResizedCrop takes it.

    It is the first of the tries that fits into the image, else the centre.
    """
    for attempt in range(CROP_TRIES):
        area, ratio = params.area[sample, attempt], params.ratio[sample, attempt]
        crop_w = math.floor(math.sqrt(area * (height * width) * ratio) + 0.5)
        crop_h = math.floor(math.sqrt(area * (height * width) / ratio) + 0.5)
        if 0 < crop_w <= width and 0 < crop_h <= height:
            top = math.floor(params.position[sample, 0] * (height - crop_h + 1))
            left = math.floor(params.position[sample, 1] * (width - crop_w + 1))
            return Rectangle(top, left, crop_h, crop_w)
    crop_h = min(height, math.floor(width / CROP_RATIO[0] + 0.5))
    crop_w = min(width, math.floor(height * CROP_RATIO[1] + 0.5))
    return Rectangle((height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w)


def eval_short_side(size: int) -> int:
    """Return the length of the short side before the centre crop of `size` pixels."""
    return int(size / EVAL_CROP_RATIO)


def eval_view(height: int, width: int, size: int) -> View:
    """Return evaluation's `size` x `size` view, as torchvision's Resize and CenterCrop take it."""
    short = int(size / EVAL_CROP_RATIO)  # `eval_short_side`; numba compiles this function alone
    resized_h = max(short, short * height // width)
    resized_w = max(short, short * width // height)
    # round() rounds halves to even, as in torchvision.
    return View(resized_h, resized_w, round((resized_h - size) / 2), round((resized_w - size) / 2))

"""Random erasing (Zhong et al. 2017) at several sizes: one box of a sample, the same part of its picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch

# torchvision's RandomErasing.
AREA = (0.02, 0.33)  # share of the image, uniform
RATIO = (0.3, 3.3)  # height / width, log-uniform
TRIES = 10

LANES = 1 + 2 * TRIES + 2  # uniform numbers that a sample takes


class Boxes(NamedTuple):
    """The boxes of the K samples of a batch that are erased, in crops that are not mirrored."""

    places: NDArray[np.int64]  # (K,) their places in the batch
    edges: NDArray[np.float64]  # (K, 4) top, left, bottom and right, as shares of the sides

    @classmethod
    def from_uniforms(cls, uniforms: NDArray[np.float64], probability: float) -> Boxes:
        """Make them from `uniforms`, (N, LANES) in [0, 1): the first of the tries that fits, else none."""
        chance, area, ratio, corner = np.split(uniforms, (1, 1 + TRIES, 1 + 2 * TRIES), axis=1)
        area = AREA[0] + (AREA[1] - AREA[0]) * area
        low, high = np.log(RATIO)
        ratio = np.exp(low + (high - low) * ratio)
        sides = np.sqrt(np.stack((area * ratio, area / ratio), axis=2))  # (N, TRIES, 2)
        fits = (sides < 1).all(axis=2)
        places = np.flatnonzero((chance[:, 0] < probability) & fits.any(axis=1))
        sides = sides[places, fits[places].argmax(axis=1)]
        corner = corner[places] * (1 - sides)
        return cls(places, np.hstack((corner, corner + sides)))


def erase(batch: Batch, boxes: Boxes, flip: NDArray[np.bool_]) -> None:
    """Set the boxes to 0, the mean colour of normalised images, in place; edges at the nearest pixel.

    flip: (N, S), where an image is mirrored, and with it its box.
    """
    for images, mirrored in zip(batch.images, flip[boxes.places].T, strict=True):
        size = images.shape[-1]
        top, left, bottom, right = np.rint(boxes.edges * size).astype(int).T
        left, right = np.where(mirrored, (size - right, size - left), (left, right))
        pixels = np.stack((top, bottom, left, right), axis=1)
        # On a CPU a mask of the whole batch takes 20 times as long; on a GPU a box is a kernel to launch.
        fill = _fill_each if images.device.type == "cpu" else _fill_masked
        fill(images, boxes.places, pixels)


def _fill_each(images: Tensor, places: NDArray[np.int64], pixels: NDArray[np.int64]) -> None:
    for i, (top, bottom, left, right) in zip(places.tolist(), pixels.tolist(), strict=True):
        images[i, :, top:bottom, left:right] = 0


def _fill_masked(images: Tensor, places: NDArray[np.int64], pixels: NDArray[np.int64]) -> None:
    """Do what `_fill_each` does, by as many kernels for any number of boxes, without a synchronisation."""
    edges = torch.zeros((len(images), 4), dtype=torch.int32)  # others have no pixel in their box
    edges[torch.from_numpy(places)] = torch.from_numpy(pixels).int()
    if images.is_cuda:
        edges = edges.pin_memory()  # a copy from pageable memory would not be asynchronous
    top, bottom, left, right = edges.to(images.device, non_blocking=True)[:, :, None].unbind(1)
    line = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (
        (line >= first) & (line < last) for first, last in ((top, bottom), (left, right))
    )
    images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)

"""Decode samples once and crop and resize them to every size: compiled by numba, without the GIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import pipelines.resize
from pipelines import transforms
from pipelines.ffcv import native
from pipelines.ffcv.beton import Samples
from pipelines.ffcv.layout import RAW, Bytes
from pipelines.ffcv.turbojpeg import ACCURATE_DCT, RGB
from pipelines.resize import Table, resize
from pipelines.transforms import CropParams, Rectangle, View
from pipelines.utils.compiled import compiler

# `training_views`, `augmented_views` or `eval_views`.
Views = Callable[..., None]
# Returns the crop of sample i of a batch as it is to be seen.
Augment = Callable[[Image.Image, int], Image.Image]

FINE, FAULTY = 0, 1


class Job(NamedTuple):
    """The N samples of a batch, and where their views are written."""

    samples: Samples
    table: Table  # as in `resize`
    outs: tuple[NDArray[Any], ...]  # one (N, s, 3 * s) per size
    status: Bytes  # (N,) FINE where the views were written


_compiled = compiler(__file__, native.__file__, transforms.__file__, pipelines.resize.__file__)

_pread = native.pread
_decompress = native.decompress
_read_header = native.read_header
_open_handle = native.open_handle
_close_handle = native.close_handle
_random_resized_crop = _compiled(transforms.random_resized_crop)
_eval_view = _compiled(transforms.eval_view)


@_compiled
def training_views(file: int, job: Job, first: int, last: int, crop_params: CropParams) -> None:
    """Write samples `first` to `last` - 1 of a batch, cropped and flipped by `crop_params`.

    file: descriptor of the .beton file.
    """
    samples, status = job.samples, job.status
    for i in range(first, last):
        status[i], pixels = decode(file, samples, i)
        if status[i] == FINE:
            box = _random_resized_crop(samples.height[i], samples.width[i], crop_params, i)
            _write(pixels, box, job, i, crop_params.flip)


def augmented_views(
    file: int, job: Job, first: int, last: int, crop_params: CropParams, augment: Augment
) -> None:
    """Write samples as `training_views` does, but their crops as `augment` changes them."""
    for i in range(first, last):
        job.status[i], crop = _decode_crop(file, job.samples, i, crop_params)
        if job.status[i] == FINE:
            pixels = np.asarray(augment(Image.fromarray(crop), i))
            height, width, _ = pixels.shape
            box = Rectangle(0, 0, height, width)
            _write(pixels.reshape(height, 3 * width), box, job, i, crop_params.flip)


@_compiled
def _decode_crop(file: int, samples: Samples, i: int, crop_params: CropParams) -> Any:
    """Return the status of sample `i` and, if it is FINE, its crop as (height, width, 3)."""
    status, pixels = decode(file, samples, i)
    if status != FINE:
        return status, np.empty((0, 0, 3), np.uint8)
    top, left, height, width = _random_resized_crop(
        samples.height[i], samples.width[i], crop_params, i
    )
    band = pixels[top : top + height, 3 * left : 3 * (left + width)].copy()
    return status, band.reshape(height, width, 3)


@_compiled
def _write(pixels: Bytes, box: Rectangle, job: Job, i: int, flip: NDArray[np.bool_]) -> None:
    """Write the crop `box` of sample `i`, (height, 3 * width), at every size but 0."""
    for k in range(len(job.outs)):
        out = job.outs[k][i]
        if len(out) == 0:
            continue
        resize(pixels, box, View(len(out), len(out), 0, 0), flip[i, k], job.table, out)


@_compiled
def eval_views(file: int, job: Job, first: int, last: int) -> None:
    """Write samples as `training_views` does, but as evaluation's centre crop of each size."""
    samples, status = job.samples, job.status
    for i in range(first, last):
        status[i], pixels = decode(file, samples, i)
        if status[i] == FINE:
            height, width = samples.height[i], samples.width[i]
            box = Rectangle(0, 0, height, width)
            for k in range(len(job.outs)):
                out = job.outs[k][i]
                resize(pixels, box, _eval_view(height, width, len(out)), False, job.table, out)


@_compiled
def decode(file: int, samples: Samples, i: int) -> Any:
    """Return the status of sample `i` and, if it is FINE, its pixels as (height, 3 * width)."""
    height, width = samples.height[i], samples.width[i]
    stored = np.empty(samples.size[i], np.uint8)
    if _pread(file, stored.ctypes.data, stored.size, samples.pointer[i]) != stored.size:
        return FAULTY, stored.reshape(1, -1)
    if samples.mode[i] == RAW:
        return FINE, stored.reshape(height, 3 * width)
    pixels = np.empty((height, 3 * width), np.uint8)
    handle = _open_handle()  # of its own, as `turbojpeg` says
    code = _decode_jpeg(handle, stored, pixels)
    _close_handle(handle)
    return (FINE if code == 0 else FAULTY), pixels


@_compiled
def _decode_jpeg(handle: Any, jpeg: Bytes, pixels: Bytes) -> Any:
    """Decode into (height, 3 * width); return 0 if the JPEG is sound and has that size."""
    height, width = len(pixels), pixels.shape[1] // 3
    # The decoder takes any size that fits, and would leave the rest of the pixels uninitialised.
    header = np.zeros(4, np.int32)  # of a file of tables alone they stay as they are
    at = header.ctypes.data
    code = _read_header(handle, jpeg.ctypes.data, jpeg.size, at, at + 4, at + 8, at + 12)
    if code != 0 or header[0] != width or header[1] != height:
        return -1
    return _decompress(
        handle, jpeg.ctypes.data, jpeg.size, pixels.ctypes.data, width, 0, height, RGB, ACCURATE_DCT
    )

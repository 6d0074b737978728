"""One read and one decode of a sample, one crop rectangle, every size: compiled, without Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipelines import transforms
from pipelines.ffcv import turbojpeg
from pipelines.ffcv.beton import RAW, Samples
from pipelines.ffcv.turbojpeg import ACCURATE_DCT, RGB, Bytes, kept_threads
from pipelines.resize import Table, resize
from pipelines.transforms import CropParams, Rectangle, View

with kept_threads():
    from ffcv.libffcv import read

# What `training_views` and `eval_views` have in common, but for the draws.
Views = Callable[..., None]

FINE, CUT_OFF, UNDECODABLE = 0, 1, 2

_read = njit(nogil=True)(read)
_decompress = turbojpeg.decompress
_read_header = turbojpeg.read_header
_random_resized_crop = njit(nogil=True)(transforms.random_resized_crop)
_eval_view = njit(nogil=True)(transforms.eval_view)


@njit(nogil=True)
def training_views(
    file: int,
    decoder: int,
    samples: Samples,
    draws: CropParams,
    first: int,
    last: int,
    table: Table,
    outs: tuple[NDArray[Any], ...],
    status: Bytes,
) -> None:
    """Samples `first` to `last` - 1 of a batch of N, cropped and flipped as `draws` says.

    file: descriptor; decoder: TurboJPEG handle; table: as in `resize`. outs: one array per size,
    (N, s, 3 * s). status: (N,), FINE where they were filled.
    """
    for i in range(first, last):
        status[i], pixels = decode(file, decoder, samples, i)
        if status[i] == FINE:
            box = _random_resized_crop(samples.height[i], samples.width[i], draws, i)
            for k in range(len(outs)):
                out = outs[k][i]
                view = View(len(out), len(out), 0, 0)
                resize(pixels, box, view, draws.flip[i, k], table, out)


@njit(nogil=True)
def eval_views(
    file: int,
    decoder: int,
    samples: Samples,
    first: int,
    last: int,
    table: Table,
    outs: tuple[NDArray[Any], ...],
    status: Bytes,
) -> None:
    """As `training_views`, but each size is the centre of the image at the evaluation's scale."""
    for i in range(first, last):
        status[i], pixels = decode(file, decoder, samples, i)
        if status[i] == FINE:
            height, width = samples.height[i], samples.width[i]
            box = Rectangle(0, 0, height, width)
            for k in range(len(outs)):
                out = outs[k][i]
                resize(pixels, box, _eval_view(height, width, len(out)), False, table, out)


@njit(nogil=True)
def decode(file: int, decoder: int, samples: Samples, i: int) -> Any:
    """The status and, if it is FINE, the pixels as (height, 3 * width)."""
    height, width = samples.height[i], samples.width[i]
    stored = np.empty(samples.size[i], np.uint8)
    if _read(file, stored, samples.pointer[i]) != stored.size:
        return CUT_OFF, stored.reshape(1, -1)
    if samples.mode[i] == RAW:
        return FINE, stored.reshape(height, 3 * width)
    # The decoder takes any size that fits, and leaves what is around it as it was.
    header = np.empty(4, np.int32)
    at = header.ctypes.data
    code = _read_header(decoder, stored.ctypes.data, stored.size, at, at + 4, at + 8, at + 12)
    if code != 0 or header[0] != width or header[1] != height:
        return UNDECODABLE, stored.reshape(1, -1)
    pixels = np.empty((height, 3 * width), np.uint8)
    code = _decompress(
        decoder, stored.ctypes.data, stored.size, pixels.ctypes.data,
        width, 0, height, RGB, ACCURATE_DCT,
    )  # fmt: skip
    return (FINE if code == 0 else UNDECODABLE), pixels

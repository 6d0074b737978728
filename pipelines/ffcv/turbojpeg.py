"""Exact JPEG decoding by the libturbojpeg that FFCV is linked with; errors are reported.

FFCV's own `imdecode` asks for the fast inverse transform, which is off by 1.2 of 255 on average (500
ImageNet photos) and no faster than the exact one on a CPU with vector instructions; and its decoders
ignore the return code. The exact transform gives PIL's pixels, bit for bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.ffcv.layout import Bytes
from pipelines.image_formats import PIL_MAX_MEGAPIXELS
from pipelines.utils.errors import DataError


def _load_library() -> ctypes.CDLL:
    """Load FFCV's library without FFCV, whose import takes five seconds and sets PyTorch's threads to one.

    Raises ImportError if it is not installed.
    """
    found = importlib.util.find_spec("ffcv")
    for folder in found.submodule_search_locations or () if found else ():
        for path in Path(folder).glob("_libffcv*"):
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:  # a library that it is linked with is missing
                raise ImportError(str(error), name="ffcv") from error
    raise ModuleNotFoundError("No module named 'ffcv'", name="ffcv")


lib = _load_library()

RGB = 0  # TJPF_RGB
ACCURATE_DCT = 4096  # TJFLAG_ACCURATEDCT

_handle, _address, _int = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(lib, name)
    function.restype, function.argtypes = result, arguments
    return function


# (handle, jpeg, bytes, pixels, width, pitch, height, pixel format, flags) -> 0, or -1 even for a warning:
# truncated files are warnings. Also called from compiled code.
decompress = _function(
    "tjDecompress2", _int,
    _handle, _address, ctypes.c_ulong, _address, _int, _int, _int, _int, _int,
)  # fmt: skip
# (handle, jpeg, bytes, and where to put four ints: width, height, subsampling, color space) -> 0 or -1.
read_header = _function(
    "tjDecompressHeader3", _int,
    _handle, _address, ctypes.c_ulong, _address, _address, _address, _address,
)  # fmt: skip
# A handle decodes one image: it keeps an image's tables for the next, and a damaged table makes it refuse
# every image that follows. Opening and closing one takes 1 us. Also called from compiled code.
open_handle = _function("tjInitDecompress", _handle)
close_handle = _function("tjDestroy", _int, _handle)
_error = _function("tjGetErrorStr2", ctypes.c_char_p, _handle)


def decode_jpeg(jpeg: Bytes) -> Bytes:
    """Return (height, width, 3) of a complete JPEG without faults; CMYK is not supported.

    Raises DataError with libjpeg's message.
    """
    with _new_handle() as handle:
        numbers = np.zeros(4, np.int32)  # of a file of tables alone they stay as they are
        places = [numbers[i:].ctypes.data for i in range(4)]
        _check(handle, read_header(handle, jpeg.ctypes.data, jpeg.size, *places))
        width, height = int(numbers[0]), int(numbers[1])
        if height * width > 1e6 * PIL_MAX_MEGAPIXELS:
            raise DataError(f"its header says {height} x {width} pixels, which is too large")
        pixels = np.empty((height, width, 3), np.uint8)
        code = decompress(
            handle, jpeg.ctypes.data, jpeg.size, pixels.ctypes.data,
            width, 0, height, RGB, ACCURATE_DCT,
        )  # fmt: skip
        _check(handle, code)
    return pixels


@contextlib.contextmanager
def _new_handle() -> Iterator[int]:
    handle = open_handle()
    if not handle:
        raise MemoryError
    try:
        yield handle
    finally:
        close_handle(handle)


def _check(handle: int, code: int) -> None:
    if code != 0:
        raise DataError(_error(handle).decode(errors="replace"))

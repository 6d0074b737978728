"""Exact JPEG decoding by the libturbojpeg that FFCV is linked with; errors are reported.

FFCV's own `imdecode` asks for the fast inverse transform, which is off by 1.2 of 255 on average (500
ImageNet photos) and no faster than the exact one on a CPU with vector instructions; and its decoders
ignore the return code. The exact transform gives PIL's pixels, bit for bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.utils.errors import DataError


@contextlib.contextmanager
def kept_threads() -> Iterator[None]:
    """Keep PyTorch's number of threads, which importing FFCV sets to one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


with kept_threads():
    from ffcv.libffcv import lib

Bytes = NDArray[np.uint8]

RGB = 0  # TJPF_RGB
ACCURATE_DCT = 4096  # TJFLAG_ACCURATEDCT
MAX_PIXELS = 2 * 1024**3 // 4 // 3  # PIL's limit, above which it suspects a decompression bomb

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
_open = _function("tjInitDecompress", _handle)
_close = _function("tjDestroy", _int, _handle)
_error = _function("tjGetErrorStr2", ctypes.c_char_p, _handle)


class JpegDecoder:
    """A TurboJPEG handle, for one thread at a time. Raises DataError with libjpeg's message."""

    def __init__(self) -> None:
        self.handle: int = _open()
        weakref.finalize(self, _close, self.handle)

    def shape(self, jpeg: Bytes) -> tuple[int, int]:
        """Return (height, width) from the file's header."""
        numbers = np.empty(4, np.int32)
        places = [numbers[i:].ctypes.data for i in range(4)]
        self._check(read_header(self.handle, jpeg.ctypes.data, jpeg.size, *places))
        return int(numbers[1]), int(numbers[0])

    def decode(self, jpeg: Bytes) -> Bytes:
        """Return (height, width, 3) of a complete JPEG without faults; CMYK is not supported."""
        height, width = self.shape(jpeg)
        if height * width > MAX_PIXELS:
            raise DataError(f"its header says {height} x {width} pixels, which is too large")
        pixels = np.empty((height, width, 3), np.uint8)
        self._check(
            decompress(
                self.handle, jpeg.ctypes.data, jpeg.size, pixels.ctypes.data,
                width, 0, height, RGB, ACCURATE_DCT,
            )
        )  # fmt: skip
        return pixels

    def _check(self, code: int) -> None:
        if code != 0:
            raise DataError(_error(self.handle).decode(errors="replace"))

"""One image file to what is stored of it: its own bytes wherever the loader's decoder takes them."""

from __future__ import annotations

import io
import os
import stat
import threading
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.beton import WriteMode
from pipelines.beton_file import JPG, RAW, Stored
from pipelines.errors import DataError, first_line
from pipelines.picture import open_image
from pipelines.sampling import uniforms
from pipelines.turbojpeg import Bytes, JpegDecoder

MAX_SIDE = 65500  # libjpeg's limit; FFCV's table has 16 bits for it


@dataclass(frozen=True)
class Settings:
    """What the stored bytes depend on besides the images."""

    write_mode: WriteMode
    max_resolution: int | None
    jpeg_quality: int
    compress_probability: float


class Encoded(NamedTuple):
    """`how`: "copied", "encoded" or "raw"."""

    stored: Stored
    how: str


class Encoder:
    """Callable from several threads at once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._local = threading.local()

    def __call__(self, path: str, index: int) -> Encoded | DataError:
        """What is stored of image `index`, the same in every run; or what is wrong with it."""
        try:
            jpeg, pixels = self._read(path)
            return self._encode(jpeg, pixels, index)
        except DataError as error:
            return error
        except MemoryError:
            return DataError("it does not fit into the memory")

    def _read(self, path: str) -> tuple[Bytes | None, Bytes]:
        """(its bytes, if the loader's decoder takes them without complaint; its pixels)."""
        if not hasattr(self._local, "decoder"):
            self._local.decoder = JpegDecoder()
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - a pipe would wait for ever
                raise DataError("it is no regular file")
            data = np.fromfile(path, np.uint8)
        except OSError as error:
            raise DataError(error.strerror or str(error)) from None
        if data.size == 0:
            raise DataError("the file is empty")
        try:
            return data, self._local.decoder.decode(data)
        except DataError:  # no JPEG, or CMYK, or with faults that PIL may forgive
            return None, _pixels_by_pil(path)

    def _encode(self, jpeg: Bytes | None, pixels: Bytes, index: int) -> Encoded:
        settings = self._settings
        height, width = pixels.shape[:2]
        longest = max(height, width)
        if settings.max_resolution is not None and longest > settings.max_resolution:
            jpeg, pixels = None, _shrunk(pixels, settings.max_resolution)
            height, width = pixels.shape[:2]
        if max(height, width) > MAX_SIDE:
            raise DataError(f"{height} x {width} pixels are too many a side; use --max-resolution")
        if settings.write_mode == "raw" or (
            settings.write_mode == "proportion"
            and uniforms(0, 0, np.array([index]), 1)[0, 0] >= settings.compress_probability
        ):
            return Encoded(Stored(RAW, height, width, pixels.reshape(-1)), "raw")
        if jpeg is not None:
            return Encoded(Stored(JPG, height, width, jpeg), "copied")
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=settings.jpeg_quality)
        encoded = np.frombuffer(file.getvalue(), np.uint8)
        return Encoded(Stored(JPG, height, width, encoded), "encoded")


def _pixels_by_pil(path: str) -> Bytes:
    try:
        with open_image(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ... by format
        raise DataError(first_line(error)) from None


def _shrunk(pixels: Bytes, longest: int) -> Bytes:
    """With a longest side of `longest`, by the filter that keeps the most detail for the crops."""
    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))

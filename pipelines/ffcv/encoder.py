"""From an image file to what a .beton file stores of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.ffcv.beton import Stored
from pipelines.ffcv.layout import JPG, RAW, Bytes
from pipelines.ffcv.options import ConvertOptions, WriteMode
from pipelines.ffcv.turbojpeg import decode_jpeg
from pipelines.image_formats import (
    DECODES_WITH_ERRORS,
    check_image,
    decode_rgb,
    is_plain_jpeg,
    memory_errors,
    open_image,
)
from pipelines.sampler import uniforms
from pipelines.utils.errors import DataError

MAX_SIDE = 65500  # libjpeg's limit; FFCV's table has 16 bits for it


@dataclass(frozen=True)
class Settings:
    """The options that the stored bytes depend on."""

    write_mode: WriteMode
    max_resolution: int | None
    jpeg_quality: int
    compress_probability: float

    @classmethod
    def of(cls, options: ConvertOptions) -> Settings:
        """Take them from the command line."""
        return cls(
            options.write_mode,
            options.max_resolution,
            options.jpeg_quality,
            options.compress_probability,
        )


class Encoded(NamedTuple):
    """A sample, and how it was made: "copied", "encoded" or "raw".

    why: why the file's own bytes could not be stored, "" if they could.
    """

    stored: Stored
    how: str
    why: str = ""


class Encoder:
    """Turns image files into samples; may be called from several threads at once."""

    def __init__(self, options: ConvertOptions) -> None:
        self._settings = Settings.of(options)
        self._max_megapixels, self._strict = options.max_megapixels, options.strict

    def __call__(self, place: str, read: Callable[[], bytes], index: int) -> Encoded | DataError:
        """Return what is stored of image `index`, the same in every run, or what is wrong with it.

        place: where it lies. read: returns its bytes. Raises RunError if the system does not let it be read.
        """
        try:
            with memory_errors(place):
                jpeg, pixels, why = self._decode(read())
                return self._encode(jpeg, pixels, index)._replace(why=why)
        except DataError as error:
            return error

    def _decode(self, data: bytes) -> tuple[Bytes | None, Bytes, str]:
        """Return the bytes, None unless the loader's decoder takes them; the pixels; why not."""
        with open_image(data) as image:
            check_image(image, self._max_megapixels)
            plain, kind = is_plain_jpeg(image), f"{image.format} {image.mode}"
        jpeg = np.frombuffer(data, np.uint8)
        try:
            return jpeg, decode_jpeg(jpeg), ""
        except DataError as error:  # no JPEG, CMYK, or with faults that PIL tolerates
            pixels = np.asarray(decode_rgb(data, self._max_megapixels))
            why = f"{DECODES_WITH_ERRORS}: {error}" if plain else kind
        if plain and self._strict:
            raise DataError(why)
        return None, pixels, why

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


def _shrunk(pixels: Bytes, longest: int) -> Bytes:
    """Resize to a longest side of `longest`, by the filter that keeps the most detail for the crops."""
    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))

"""What picture a file is: one rule for every loader, the converter, `rsnet predict` and `rsnet serve`.

DALI, PIL and TurboJPEG decode what passes here to the same pixels, up to rounding by 1 of 255. Files that
they decode to different pictures are refused; `verify` lists them. docs/your-data.md has the rule as a table.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.utils.errors import DataError, UsageError, first_line
from pipelines.utils.reading import cannot_read

# The formats of IMG_EXTENSIONS, and GIF. PIL goes by the first bytes, whatever the name, and would also take
# PostScript, on which it runs Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

# Takes 0.3 GB decoded. A file of kilobytes can claim more; no photo has more. PIL itself takes 178.
DEFAULT_MAX_MEGAPIXELS = 100.0
PIL_MAX_MEGAPIXELS = 178.0

# Of a file of which the decoder made a picture nevertheless.
DECODES_WITH_ERRORS = "decodes with errors"

ORIENTATION = 274  # TIFF's tag

# Encoders write about ten. Each takes libjpeg up to 0.8 ms a megapixel, of as few as 26 bytes.
MAX_SCANS = 100
_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")  # those that have a length, and the end


def open_image(data: bytes) -> Image.Image:
    """Open the content of an image file of one of `FORMATS`; only its header is decoded.

    A file is read as a whole before: what PIL raises is the file's fault then, not that of the disk.

    Raises DataError if it is no such image, or its header is damaged.
    """
    with decode_errors(), warnings.catch_warnings():
        # PIL's, of half as many pixels as it refuses; our own limit is another one.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_scans(image, data)
    return image


def check_scans(image: Image.Image, data: bytes) -> None:
    """Raise DataError for a JPEG of so many scans that it would be decoded for minutes, or hours.

    data: the file's content. Scans of a thumbnail, or of what stands behind the picture, do not count.
    """
    if image.format not in ("JPEG", "MPO") or data.count(_SCAN) <= MAX_SCANS:
        return
    scans, at = 0, 2
    while (marker := _MARKER.search(data, at)) and marker[1] != b"\xd9":  # the picture's end
        scans += marker[1] == _SCAN[1:]
        if scans > MAX_SCANS:
            raise DataError(f"more than {MAX_SCANS} scans; save it anew")
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


def check_image(image: Image.Image, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> None:
    """Raise DataError, by the header alone, for an image too large or that decoders see differently."""
    if image.width * image.height > 1e6 * max_megapixels:
        raise DataError(
            f"{image.width} x {image.height} pixels are more than {max_megapixels:g} megapixels"
        )
    with decode_errors():  # of EXIF, which is read only now
        what = _seen_differently(image)
    if what:
        raise DataError(f"decoders do not agree on {what}; save it anew as 8-bit RGB")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image that `check_image` accepts to RGB; only now are its pixels decoded.

    Alpha is dropped, 16 bits are divided by 257, and EXIF's orientation is ignored.
    """
    if image.mode.startswith("I"):  # PIL would clip to 255
        values = np.asarray(image).astype(np.uint32)
        values += 128  # in place, as images may be large
        values //= 257
        image = Image.fromarray(values.astype(np.uint8))
    if image.mode == "RGB":
        image.load()
        return image  # PIL's own conversion would copy it
    return image.convert("RGB")


def decode_rgb(data: bytes, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> Image.Image:
    """Decode the content of an image file. Raises DataError if it is broken or refused."""
    with open_image(data) as image:
        check_image(image, max_megapixels)
        with decode_errors():
            return to_rgb(image)


def decode_error(place: str | Path, data: bytes) -> str | None:
    """Return why PIL cannot decode an image's bytes, None if it can. Raises RunError if memory lacks.

    place: where it lies, for the message.
    """
    try:
        with memory_errors(place):
            decode_rgb(data)
    except DataError as error:
        return str(error)
    return None


def require_megapixels(limit: float) -> None:
    """Raise UsageError for a --max-megapixels that PIL does not take."""
    if not 0 < limit <= PIL_MAX_MEGAPIXELS:
        raise UsageError(f"--max-megapixels {limit:g}: above 0, and at most {PIL_MAX_MEGAPIXELS:g}")


def require_strict_of_skip_bad(strict: bool, skip_bad: bool) -> None:
    """Raise UsageError for --strict alone."""
    if strict and not skip_bad:
        raise UsageError("--strict: add --skip-bad, which then leaves out what decodes with errors")


def is_plain_jpeg(image: Image.Image) -> bool:
    """Return whether all decoders have libjpeg's code for it: a JPEG in grayscale or RGB."""
    return image.format in ("JPEG", "MPO") and image.mode != "CMYK"


@contextmanager
def decode_errors() -> Iterator[None]:
    """Raise DataError for what PIL raises in the block; MemoryError is no fault of the file."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"cannot identify image file, which is none of {', '.join(FORMATS)}"
        ) from None
    except Exception as error:  # OSError, SyntaxError, struct.error, ... by format
        raise DataError(first_line(error)) from error


@contextmanager
def memory_errors(path: str | Path) -> Iterator[None]:
    """Raise RunError, with the file's path, if the memory does not suffice for the block."""
    try:
        yield
    except MemoryError:
        raise cannot_read(path, "not enough memory to decode it") from None


def _seen_differently(image: Image.Image) -> str | None:
    """Return what of the header DALI and PIL take differently, None if there is nothing.

    DALI 2.4 is in brackets, PIL 13 before them.
    """
    kind, mode = image.format, image.mode
    tile = next(iter(getattr(image, "tile", ())), None)
    if mode == "CMYK" and kind in ("JPEG", "MPO") and "adobe" not in image.info:
        return "CMYK without Adobe's marker"  # as it is (inverted)
    if kind == "PPM" and tile is not None and tile[0] == "ppm" and tile[3][1] != 65535:
        return f"a maximum of {tile[3][1]}"  # scaled to 255 (not scaled)
    if kind == "BMP" and tile is not None and str(tile[3][0]).startswith("BGR;1"):
        return "16 bits a pixel"  # scaled (shifted, or not decoded)
    if kind == "TIFF" and image.getexif().get(ORIENTATION, 1) != 1:
        return "TIFF's orientation"  # turned (as it is)
    if kind == "TIFF" and mode == "LA":
        return "TIFF's grayscale with alpha"  # alpha dropped (multiplied)
    if mode in ("F", "LAB") or (mode == "I" and kind != "PPM"):
        return f"pixels of mode {mode}"  # clipped (scaled, white, or not decoded)
    return None

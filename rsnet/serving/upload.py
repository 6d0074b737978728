"""Reading and decoding of the image in a request, within limits of bytes, time and pixels."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from fastapi import HTTPException, Request
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive
from torch import Tensor

from pipelines.image_formats import check_scans
from pipelines.transforms import eval_view
from pipelines.utils.errors import DataError, first_line
from rsnet.inference import preprocess

# Formats that cameras and browsers write. Each further one is a decoder for untrusted bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")

# A form's file stays in memory, as `_bounded` limits its bytes: there may be no disk to write on.
MultiPartParser.spool_max_size = 1 << 40

# Seconds for a body that nobody reads: 10 MB take one at 80 Mbit/s.
DISCARD_S = 1.0


@dataclass(frozen=True)
class Limits:
    """Limits of an upload.

    most_bytes: of a body. most_pixels: of an image. body_s: seconds until a body has to be there.
    """

    most_bytes: int
    most_pixels: int
    body_s: float


async def read(request: Request, limits: Limits) -> bytes:
    """Read the image file: the body, or the one file of a multipart form.

    Raises HTTPException: 400 if there is none, 408 if it does not come in time, 413 if it is too large.
    """
    bounded = Request(request.scope, _bounded(request.receive, limits.most_bytes))
    is_form = request.headers.get("content-type", "").startswith("multipart/")
    try:
        async with asyncio.timeout(limits.body_s):
            data = await _file(bounded) if is_form else await bounded.body()
    except TimeoutError:
        raise HTTPException(408, f"the image did not come within {limits.body_s:g} s") from None
    except (UnicodeError, LookupError):  # of a form's charset
        raise HTTPException(400, "the form's charset is not known") from None
    except ClientDisconnect:  # nobody reads this
        raise HTTPException(400, "the client left") from None
    if not data:
        raise HTTPException(400, "there is no image: send one as the body, or as a form's file")
    return data


async def discard(request: Request, limits: Limits) -> None:
    """Read a body, within the bounds of one, and forget it."""
    bounded = Request(request.scope, _bounded(request.receive, limits.most_bytes))
    with suppress(TimeoutError, ClientDisconnect, HTTPException):
        async with asyncio.timeout(DISCARD_S):
            async for _ in bounded.stream():
                pass


def decode(data: bytes, sizes: Sequence[int], most_pixels: int) -> dict[int, Tensor]:
    """Decode an image file; return, by size s, the (s, s, 3) uint8 pixels that an evaluation sees.

    Raises HTTPException: 400 if it is damaged, 413 if it has too many pixels, 415 if it is none of FORMATS.
    """
    too_many = HTTPException(
        413, f"the image is too large: {most_pixels / 1e6:g} million pixels are allowed"
    )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise HTTPException(415, f"this is no image; send {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_many from None
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ... by format
        raise HTTPException(400, f"the image is damaged: {first_line(error)}") from error
    with image:
        view = eval_view(image.height, image.width, max(sizes))
        if max(image.height * image.width, view.height * view.width) > most_pixels:
            raise too_many
        try:
            check_scans(image, data)
            rgb = preprocess.decode(image, "the image", max(sizes))
        except DataError as error:
            raise HTTPException(400, str(error)) from error
    return {size: preprocess.eval_pixels(rgb, size) for size in sizes}


def _bounded(receive: Receive, most: int) -> Receive:
    """Limit the bytes that arrive; Content-Length may be wrong, or missing."""
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most:
            raise HTTPException(413, f"the image is too large: {most / 1e6:g} MB are allowed")
        return message

    return bounded


async def _file(request: Request) -> bytes:
    async with request.form(max_files=1, max_fields=0) as form:
        for value in form.values():
            if isinstance(value, UploadFile):
                return await value.read()
    return b""

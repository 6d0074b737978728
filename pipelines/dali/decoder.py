"""DALI's verdict on single files: whether it decodes them, and to the picture that all decoders see."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipelines.dali.graphs import build_decoder
from pipelines.image_formats import (
    DEFAULT_MAX_MEGAPIXELS,
    check_image,
    decode_error,
    decode_rgb,
    is_plain_jpeg,
    memory_errors,
    open_image,
)
from pipelines.sources.source import dali_error_line
from pipelines.utils.errors import DataError
from pipelines.utils.output import guard_output
from pipelines.utils.reading import cannot_read

# Where an encoded image lies, and what reads its bytes. Raises DataError, RunError.
Encoded = tuple[str, Callable[[], bytes]]


class Messages:
    """What decoders have written to file descriptor 2, which does not name the image."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    @property
    def size(self) -> int:
        """The bytes so far."""
        return os.fstat(self._file.fileno()).st_size

    def since(self, size: int) -> str:
        """Return the first line behind `size` bytes, "" if there is none."""
        return os.pread(self._file.fileno(), 200, size).decode(errors="replace").partition("\n")[0]


@contextlib.contextmanager
def decoder_messages() -> Iterator[Messages]:
    """Collect what libjpeg, libpng and DALI write to file descriptor 2 in the block.

    Python's own stderr still works, through a copy of the descriptor.
    """
    with contextlib.ExitStack() as stack:
        own = os.dup(2)
        stack.callback(os.close, own)
        if sys.stderr is sys.__stderr__:  # else it is redirected already
            stderr = stack.enter_context(os.fdopen(own, "w", buffering=1, closefd=False))
            stack.enter_context(contextlib.redirect_stderr(stderr))
            guard_output(False)  # the copy, too
        file = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(file.fileno(), 2)
        stack.callback(os.dup2, own, 2)
        yield Messages(file)


class Decoder:
    """Tries whether DALI's CPU decoder can decode whole images. For one thread at a time.

    In 3000 damaged files, training's crop of a file never failed where the whole file had decoded; PIL
    would have accepted 8 bad ones, and rejected 170 that DALI reads.
    """

    def __init__(self, batch_size: int = 1, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> None:
        self._batch_size, self._max_megapixels = batch_size, max_megapixels
        self._pipeline: Any = None

    def reasons(self, images: Sequence[Encoded]) -> list[str | None]:
        """Return for each of at most `batch_size` images what is wrong with it, None if nothing is.

        Raises RunError if one cannot be read: nothing is known about it then.
        """
        try:
            files = [self._checked(*image) for image in images]
        except DataError as fault:
            return [str(fault)] if len(images) == 1 else self._one_by_one(images)
        pictures = self._decode([data for data, _ in files])
        if not isinstance(pictures, Exception):
            found = zip(images, files, pictures, strict=True)
            return [self._difference(place, *file, pixels) for (place, _), file, pixels in found]
        if len(images) > 1:
            return self._one_by_one(images)
        ((place, _),), ((data, _),) = images, files
        if isinstance(pictures, MemoryError) or "bad_alloc" in str(pictures):
            raise cannot_read(place, "not enough memory to decode it")
        # PIL's messages are clearer than DALI's.
        words = f"PIL decodes it, but DALI does not ({dali_error_line(pictures)}); save it anew"
        return [decode_error(place, data) or words]

    def _one_by_one(self, images: Sequence[Encoded]) -> list[str | None]:
        return [reason for image in images for reason in self.reasons([image])]

    def reason_of(self, place: str, data: bytes) -> str | None:
        """Return what is wrong with an image's bytes, None if nothing is. place: where they lie."""
        (reason,) = self.reasons([(place, lambda: data)])
        return reason

    def words(self, place: str, data: bytes, messages: Messages) -> str:
        """Return what libjpeg says of a JPEG that it decodes nevertheless, "" if nothing.

        No other thread may decode meanwhile. Other formats' messages are of colour profiles and the like: in
        their pixels a fault is an error.
        """
        before = messages.size
        if self.reason_of(place, data) is not None or not data.startswith(b"\xff\xd8"):
            return ""
        return messages.since(before)

    def _checked(self, place: str, read: Callable[[], bytes]) -> tuple[bytes, bool]:
        """Return an image's bytes, and whether it is a plain JPEG. Raises DataError for its header."""
        data = read()
        with memory_errors(place), open_image(data) as image:
            check_image(image, self._max_megapixels)
            return data, is_plain_jpeg(image)

    def _decode(self, files: list[bytes]) -> list[NDArray[np.uint8]] | Exception:
        """Return the (height, width, 3) of each file, or DALI's error if it cannot decode all of them."""
        if self._pipeline is None:  # it does not survive an error; a new one takes 5 ms
            self._pipeline = build_decoder(self._batch_size)
        try:
            _, images = self._pipeline.run(files=[np.frombuffer(data, np.uint8) for data in files])
        except (RuntimeError, MemoryError) as error:
            self._pipeline = None
            return error
        return [np.asarray(images[i]) for i in range(len(files))]

    def _difference(
        self, place: str, data: bytes, plain_jpeg: bool, pixels: NDArray[np.uint8]
    ) -> str | None:
        """Return what is wrong with an image that DALI decoded to `pixels`, None if nothing is."""
        if plain_jpeg:
            return None
        try:
            with memory_errors(place):
                expected = np.asarray(decode_rgb(data, self._max_megapixels))
        except DataError as error:
            return f"DALI decodes it, but PIL does not ({error}); save it anew"
        # Rounding apart, as of 16 bits to 8.
        if expected.shape == pixels.shape and np.allclose(expected, pixels, rtol=0, atol=1):
            return None
        return "DALI and PIL decode it to different pictures; save it anew as 8-bit RGB"

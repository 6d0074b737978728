"""`python -m pipelines convert --verify FILE`: read and decode a .beton file sample by sample."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import numpy as np

from pipelines.ffcv.beton import Beton, open_beton
from pipelines.ffcv.layout import RAW, Bytes
from pipelines.ffcv.sidecar import check_sidecar, read_sidecar
from pipelines.ffcv.turbojpeg import decode_jpeg
from pipelines.image_formats import memory_errors
from pipelines.sampler import Indices
from pipelines.utils.atomic_io import sha256_file
from pipelines.utils.errors import DataError
from pipelines.utils.output import say
from pipelines.utils.progress import ProgressBar
from pipelines.utils.reading import reading
from pipelines.utils.thread_map import ordered_map


def verify(path: Path, workers: int) -> int:
    """Print the broken samples of a file; return 1 if there are any, else 0.

    Raises UsageError if there is no such file, DataError if it or its sidecar as a whole is damaged.
    """
    beton = open_beton(path)
    found = read_sidecar(path)
    if found is not None:
        check_sidecar(found, beton)
    bad, size = 0, 0
    with ProgressBar(path.name, len(beton)) as progress:
        for index, reason in enumerate(reasons(beton, np.arange(len(beton)), workers)):
            if reason is not None:
                bad += 1
                say(f"{path}: sample {index} (label {beton.labels[index]}) is broken: {reason}")
            size += int(beton.samples.size[index])
            progress.update(index + 1, size, bad)
    if found is not None and found.skipped:
        say(f"{path}: {found.lacks}")
    changed = found is not None and sha256_file(path) != found.sha256
    if changed:
        say(f"{path}: its SHA-256 is not its sidecar's: it was changed after it was written")
    what = "no sidecar" if found is None else "another SHA-256" if changed else "SHA-256 as written"
    say(f"{path}: {len(beton) - bad} of {len(beton)} samples are sound; {what}")
    return 1 if bad or changed else 0


def reasons(beton: Beton, indices: Indices, workers: int) -> Generator[str | None]:
    """Read and decode each of the samples; yield what is wrong with it, None if nothing is."""
    with beton.path.open("rb", buffering=0) as file:

        def reason(index: int) -> str | None:
            try:
                pixels(beton, file.fileno(), index)
            except DataError as error:
                return str(error)
            return None

        yield from ordered_map(reason, indices.tolist(), workers)


def pixels(beton: Beton, file: int, index: int) -> Bytes:
    """Return (height, width, 3) of one sample of the open file.

    Raises DataError if it is broken, RunError if it cannot be read, or not be decoded for lack of memory.
    """
    shape = int(beton.samples.height[index]), int(beton.samples.width[index])
    data = stored_bytes(beton, file, index)
    if beton.samples.mode[index] == RAW:
        return data.reshape(*shape, 3)
    with memory_errors(beton.path):
        decoded = decode_jpeg(data)
    if decoded.shape[:2] != shape:
        raise DataError(
            f"its JPEG has {decoded.shape[:2]} pixels, the table of contents says {shape}"
        )
    return decoded


def stored_bytes(beton: Beton, file: int, index: int) -> Bytes:
    """Return the stored bytes of a sample.

    Raises DataError if the file ends before the sample does, RunError if it cannot be read.
    """
    size = int(beton.samples.size[index])
    with reading(beton.path):
        data = np.frombuffer(os.pread(file, size, int(beton.samples.pointer[index])), np.uint8)
    if data.size != size:
        raise DataError("the file ends before it does")
    return data

"""FFCV's file format, version 2, and the sidecar FILE.beton.json that describes such a file.

A .beton file is opened only if it is complete, and written in order by one thread: FFCV's own reader opens
half-written and truncated files without complaint, and its writer hangs forever on one bad sample. The
layout is in `pipelines.ffcv.layout`, which the reader and the writer here share. The sidecar says what the
file was made from, and its size and SHA-256.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.ffcv.layout import (
    ALLOCATION,
    DESCRIPTOR,
    FIELDS,
    HEADER,
    JPG,
    KINDS,
    RAW,
    VERSION,
    Bytes,
    name_of,
    row_type,
)
from pipelines.image_formats import PIL_MAX_MEGAPIXELS
from pipelines.utils.errors import DataError, RunError, UsageError
from pipelines.utils.reading import Stamp, file_stamp, reading

# FFCV's own choice. It reads whole pages, so a sample never crosses a page; pages grow for a larger sample.
PAGE_SIZE = 1 << 23
MAX_CLASSES = 1 << 20


class Samples(NamedTuple):
    """Places and shapes of the N samples of a file, as arrays of N, which compiled code can read."""

    pointer: NDArray[np.uint64]
    size: NDArray[np.uint64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    mode: NDArray[np.uint8]  # RAW or JPG

    def take(self, indices: NDArray[np.int64]) -> Samples:
        """Return the samples of these indices, in this order."""
        return Samples(*(column[indices] for column in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Beton:
    """The table of contents of a .beton file."""

    path: Path
    samples: Samples
    labels: NDArray[np.int64]  # (N,)
    page_size: int
    stamp: Stamp = None
    """The file's, before it was read: another file of that name has other images at these places."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pages(self) -> NDArray[np.int64]:
        """(N,) index of the page that each sample is in."""
        return (self.samples.pointer // np.uint64(self.page_size)).astype(np.int64)


def open_beton(path: Path) -> Beton:
    """Read the table of contents of an image-and-label file, by this converter or by FFCV's writer.

    Raises UsageError if there is no such file, DataError if it is incomplete or of another kind.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}; rsnet convert makes it")
    stamp = file_stamp(str(path))
    _check_header(path)
    names = _checked_fields(path)
    try:
        with reading(path):
            header = np.fromfile(path, HEADER, count=1)[0]
            start = HEADER.itemsize + len(names) * DESCRIPTOR.itemsize
            rows = np.fromfile(path, row_type(names), int(header["num_samples"]), offset=start)
            table = np.fromfile(path, ALLOCATION, offset=int(header["alloc_table_ptr"]))
    except RunError:
        raise
    except Exception as error:  # whatever numpy says of the bytes
        raise _broken_file(path, f"its header is damaged ({error!r})") from None
    if len(rows) != header["num_samples"]:
        raise _broken_file(path, "it has fewer rows than samples")
    image, labels = (rows[f"f{names.index(name)}"] for name in FIELDS)
    samples = Samples(
        image["data_ptr"].copy(),
        _stored_sizes(path, image["data_ptr"], table),
        image["height"].astype(np.int64),
        image["width"].astype(np.int64),
        image["mode"].copy(),
    )
    raw = samples.mode == RAW
    wrong = raw & (samples.size != (3 * samples.height * samples.width).astype(np.uint64))
    wrong |= (samples.mode != RAW) & (samples.mode != JPG)
    pixels = samples.height * samples.width
    wrong |= pixels > 1e6 * PIL_MAX_MEGAPIXELS  # before memory is allocated for them
    wrong |= (samples.height < 1) | (samples.width < 1) | (labels < 0) | (labels >= MAX_CLASSES)
    if wrong.any():
        raise _broken_file(path, f"sample {int(np.argmax(wrong))} has an impossible shape or label")
    return Beton(path, samples, labels.astype(np.int64), int(header["page_size"]), stamp)


def table_sha256(path: Path) -> str:
    """Return the SHA-256 of all in the file but the images: labels, sizes and positions.

    Takes 0.1 s for ImageNet's 70 MB.
    """
    header = np.fromfile(path, HEADER, count=1)[0]
    metadata = int(header["num_samples"]) * row_type(FIELDS).itemsize
    descriptors = int(header["num_fields"]) * DESCRIPTOR.itemsize
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(HEADER.itemsize + descriptors + metadata))
        file.seek(int(header["alloc_table_ptr"]))
        digest.update(file.read())
    return digest.hexdigest()


def broken_sample(beton: Beton, index: int, name: str, reason: str) -> DataError:
    """Return the error that names a broken sample; `name`: its class."""
    return DataError(
        f"{beton.path}: sample {index} (class {name}) is broken: {reason}; "
        f"rsnet convert --verify {beton.path} lists all that are"
    )


class Stored(NamedTuple):
    """A sample as it is stored in a file: a JPEG's bytes, or (height, width, 3) raw pixels, flat."""

    mode: int
    height: int
    width: int
    data: Bytes


class BetonWriter:
    """Writes samples one after the other into an empty file with space for `capacity` of them.

    Raises OSError as the file does. The file is no valid .beton file before `finish`.
    """

    def __init__(self, file: BinaryIO, capacity: int) -> None:
        self._file = file
        self._samples = np.zeros(capacity, row_type(FIELDS))
        self._table = np.zeros(capacity, ALLOCATION)
        self._fields = _field_descriptors()
        self._page = PAGE_SIZE
        self._count = 0
        tables = HEADER.itemsize + self._fields.nbytes + self._samples.nbytes
        self._end = _round_up(int(tables), self._page)

    def add(self, sample: Stored, label: int) -> None:
        """Append a sample."""
        size = sample.data.size
        while size > self._page:  # two pages of the old size make one of the new
            self._page *= 2
        start = self._end
        if start // self._page != (start + size - 1) // self._page:
            start = _round_up(start, self._page)
        self._file.seek(start)
        self._file.write(sample.data.data)
        row = (sample.mode, sample.width, sample.height, start)
        self._samples[self._count] = (row, label)
        self._table[self._count] = (self._count, start, size)
        self._count, self._end = self._count + 1, start + size

    @property
    def bytes_written(self) -> int:
        """The position behind the last sample."""
        return self._end

    def finish(self) -> None:
        """Write the tables and, last of all, the header."""
        self._file.seek(self._end)
        self._file.write(self._table[: self._count].tobytes())
        header = np.zeros(1, HEADER)
        header["version"], header["num_fields"] = VERSION, len(FIELDS)
        header["num_samples"], header["page_size"] = self._count, self._page
        header["alloc_table_ptr"] = self._end
        self._file.seek(HEADER.itemsize)
        self._file.write(self._fields.tobytes() + self._samples[: self._count].tobytes())
        self._file.flush()
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()


def _check_header(path: Path) -> None:
    """Raise DataError if the file is incomplete: all of a half-written one would be its table."""
    size = path.stat().st_size
    if size < HEADER.itemsize:
        raise _broken_file(path, f"it has {size} bytes only")
    with reading(path):
        header = np.fromfile(path, HEADER, count=1)[0]
    table, samples = int(header["alloc_table_ptr"]), int(header["num_samples"])
    if header["version"] != VERSION or not 1 <= header["num_fields"] <= 64:
        raise _broken_file(path, f"it is no FFCV file of version {VERSION}")
    if table == 0:
        raise _broken_file(path, "it was not written to its end")
    if table + samples * ALLOCATION.itemsize != size or not samples:
        raise _broken_file(path, f"it is cut off, or longer than it should be ({size} bytes)")


def _checked_fields(path: Path) -> list[str]:
    """Return the fields' names, in their order.

    Raises DataError, which names all with their types, unless they are an image and a label.
    """
    count = int(np.fromfile(path, HEADER, count=1)[0]["num_fields"])
    descriptors = np.fromfile(path, DESCRIPTOR, count=count, offset=HEADER.itemsize)
    found = _named(descriptors)
    wanted = _named(_field_descriptors())
    if sorted(found) != sorted(wanted):
        raise _broken_file(
            path, f"its fields are {', '.join(found)} instead of {' and '.join(wanted)}"
        )
    return [name_of(descriptor) for descriptor in descriptors]


def _named(descriptors: NDArray[Any]) -> list[str]:
    """Return each field as `name (type)`. Of types that FFCV does not know, it has the number alone."""
    kinds = dict(enumerate(KINDS))
    return [
        f"{name_of(field)} ({kinds.get(int(field['type_id']), 'a type of its own')})"
        for field in descriptors
    ]


def _stored_sizes(path: Path, pointers: Any, table: Any) -> NDArray[np.uint64]:
    """Return the number of bytes at each pointer, from the allocation table."""
    order = np.argsort(table["ptr"])
    rows = order[np.searchsorted(table["ptr"], pointers, sorter=order).clip(0, len(table) - 1)]
    sizes: NDArray[np.uint64] = table["size"][rows]
    end = np.uint64(path.stat().st_size)
    # A sum of both could wrap around.
    fits = (pointers <= end) & (sizes <= end - np.minimum(pointers, end))
    if not (fits & (table["ptr"][rows] == pointers)).all():
        raise _broken_file(path, "its samples and its allocation table do not agree")
    return sizes


def _broken_file(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: {reason}; convert it anew with rsnet convert")


def _field_descriptors() -> NDArray[Any]:
    descriptors = np.zeros(len(FIELDS), DESCRIPTOR)
    for descriptor, (name, field) in zip(descriptors, FIELDS.items(), strict=True):
        descriptor["type_id"] = field.kind
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return descriptors


def _round_up(position: int, page: int) -> int:
    """Return the first multiple of `page` from `position` on."""
    return -(-position // page) * page

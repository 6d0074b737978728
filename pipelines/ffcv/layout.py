"""Layout of FFCV's file format, version 2, as `ffcv.types` has it; importing that takes five seconds.

A file is a header, a descriptor of each field, a row for each sample, pages of data, and a table of what the
data of each sample takes. All numbers are little-endian.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

VERSION = 2

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
DESCRIPTOR = np.dtype(
    [("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True
)

# Kinds of fields, by the number in their descriptors; any other is of its writer alone.
KINDS = (
    *("FloatField", "IntField", "RGBImageField", "BytesField", "NDArrayField", "JSONField"),
    "TorchTensorField",
)

# "mode" of an image.
JPG, RAW = 0, 1


class Field(NamedTuple):
    """A field of ours: the number of its kind, and its part of a sample's row."""

    kind: int
    row: Any


IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
FIELDS = {
    "image": Field(KINDS.index("RGBImageField"), IMAGE),
    "label": Field(KINDS.index("IntField"), np.dtype("<i8")),
}


def row_type(names: Iterable[str]) -> Any:
    """Return the type of a sample's row in a file with these fields, in this order: f0, f1, ..."""
    return np.dtype([("", FIELDS[name].row) for name in names], align=True)


def name_of(descriptor: Any) -> str:
    """Return the name of a field, which ends with a zero."""
    name: str = (
        descriptor["name"].tobytes().partition(bytes(1))[0].decode(errors="backslashreplace")
    )
    return name

"""Files that `torch.save` wrote, read without executing what is in them."""

from __future__ import annotations

import re
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.utils.errors import DataError, first_line

# Classes that trainers keep beside the weights and torch refuses, though they are harmless: options, and
# accuracies as NumPy's numbers, whose constructor is named as NumPy 1 did or as it is now.
_MAKE_SCALAR: Any = np.float64().__reduce__()[0]
HARMLESS: list[Any] = [
    Namespace,
    (_MAKE_SCALAR, "numpy.core.multiarray.scalar"),
    _MAKE_SCALAR,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i8")),
]


def require_plain_zip(path: Path, growth: float) -> None:
    """Raise DataError if the members of a zip file claim to be more than `growth` times its size.

    Deflate packs a thousand zeros into a byte, and members may overlap: a small file fills any memory.
    """
    with zipfile.ZipFile(path) as file:
        claimed = sum(member.file_size for member in file.infolist())
    size = path.stat().st_size
    if claimed > growth * size:
        raise DataError(f"its {size} bytes claim to hold {claimed}")


def safe_load(path: Path) -> Any:
    """Return the content of `path`, on the CPU.

    Raises DataError with one line if it cannot be read, or holds more than tensors and plain values, or
    would grow while it is read: `torch.save` compresses nothing.
    """
    try:
        if zipfile.is_zipfile(path):
            require_plain_zip(path, growth=1)
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # a file of another kind may raise anything in the readers of zip and pickle
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        what = f"it holds code: {foreign[1]}" if foreign else first_line(error)
        if what.startswith("Weights only load failed"):  # and the advice to execute what is in it
            what = "it is no file of tensors and plain values that torch.save wrote"
        raise DataError(what) from error

"""Tables that list images: .csv, .jsonl or .parquet with the columns path and label; split and weight.

Paths are relative to the table's folder. A label is a name or a number; numbers keep their order.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from pipelines.sources.source import (
    REPORT,
    Source,
    count_text,
    indices_of,
    ordered_classes,
)
from pipelines.utils.errors import UsageError, first_line
from pipelines.utils.reading import Stamp, file_stamp, read_file, reading
from pipelines.utils.text import first_names

SUFFIXES = (".csv", ".jsonl", ".parquet")
# The first of each that is there; the others are the names of Hugging Face's and of torchvision's tables.
COLUMNS = {
    "path": ("path", "file_name", "filename"),
    "label": ("label", "class"),
    "split": ("split",),
}
KNOWN = {*itertools.chain(*COLUMNS.values()), "weight"}
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation")}
THREADS = 16  # that look whether files are there: a file server answers many at once


@dataclass(frozen=True)
class Manifest(Source):
    """The images of one split of a table, in the order of their paths."""

    data: Path
    paths: list[str]
    """Relative to the table's folder."""

    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of the table's rows that are neither for training nor for validation, by split."""

    has_files: ClassVar[bool] = True

    @property
    def place(self) -> str:
        """The table, and the split."""
        return f"{self.data} ({self.split})"

    @property
    def names(self) -> list[str]:
        """The paths, as the table has them."""
        return self.paths

    @property
    def counted(self) -> str:
        """What was found, as text."""
        text = count_text(len(self.paths), len(self.classes))
        if self.passed_over:
            splits = [f"{split} {count}" for split, count in self.passed_over.most_common()]
            text += f"; {self.passed_over.total()} rows of other splits passed over ({first_names(splits)})"
        return text

    @property
    def report(self) -> Path:
        """Beside the table."""
        return self.data.with_name(f"{self.data.name}.{REPORT}")

    def stamps(self) -> dict[str, Stamp]:
        """Return sizes and times. Raises RunError."""
        return {path: file_stamp(self.locate(i)) for i, path in enumerate(self.paths)}

    def read(self, index: int) -> bytes:
        """Return an image's bytes. Raises DataError if there are none, RunError if it cannot be read."""
        return read_file(self.locate(index))

    def locate(self, index: int) -> str:
        """Return an image's path."""
        return os.path.join(self.data.parent, self.paths[index])

    def subset(self, kept: Sequence[int], split: str | None = None) -> Self:
        """Return the rows `kept`, with all classes."""
        return self._take(kept, split, paths=[self.paths[i] for i in kept])

    def fingerprint(self) -> str:
        """Return the SHA-256 of paths and labels: a table can change a label and no path."""
        rows = zip(self.paths, self.labels, strict=True)
        lines = "\n".join(f"{path}\t{self.classes[label]}" for path, label in rows)
        return hashlib.sha256(os.fsencode(lines)).hexdigest()


def read(file: Path, split: str) -> Manifest:
    """Return the rows of a split, all rows if the table has no splits. Its classes are those of all rows.

    Raises UsageError if the table is malformed, or files that it lists are missing.
    """
    table, weights = _columns(file)
    labels = table["label"]
    classes = ordered_classes(labels)
    chosen = _rows_of(table, split)
    if not chosen:
        raise UsageError(f"{file} has no rows of split {split}")
    chosen.sort(key=lambda row: table["path"][row])
    paths = [table["path"][row] for row in chosen]
    _require_once(file, paths, chosen)
    known = {name for names in SPLITS.values() for name in names}
    found = Manifest(
        classes=classes,
        labels=indices_of([labels[row] for row in chosen], classes),
        weights=None if weights is None else weights[chosen],
        data=file,
        split=split,
        paths=paths,
        passed_over=Counter(name for name in table.get("split", ()) if name not in known),
    )
    _require_there(found)
    return found


def common_paths(one: Manifest, other: Manifest) -> list[str]:
    """Return the paths in `other` of files that are in `one`, too, sorted."""
    known = set(_files(one.data, one.paths))
    files = _files(other.data, other.paths)
    return sorted(path for path, file in zip(other.paths, files, strict=True) if file in known)


def _files(table: Path, paths: Sequence[str]) -> list[str]:
    """Return the files of a table's paths, each by one name. pathlib takes five times as long."""
    folder = str(table.parent)
    return [os.path.normpath(os.path.join(folder, path)) for path in paths]


def has_split(file: Path, split: str) -> bool:
    """Return whether the table has rows of a split."""
    table, _ = _columns(file)
    return "split" in table and bool(_rows_of(table, split))


def _rows_of(table: dict[str, list[str]], split: str) -> list[int]:
    if "split" not in table:
        return list(range(len(table["path"])))
    return [row for row, name in enumerate(table["split"]) if name in SPLITS[split]]


# The names of all columns, and the values of those that are known.
_Table = tuple[list[str], dict[str, list[Any]]]

# Columns as text, and the weight of each row.
_Columns = tuple[dict[str, list[str]], NDArray[np.float64] | None]


@functools.lru_cache(maxsize=2)  # asked for each split
def _read_columns(file: Path, _state: tuple[int, int]) -> _Columns:
    import pyarrow as pa

    try:
        with reading(file):
            found, table = _read_table(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as a table: {first_line(error)}") from None
    for known in KNOWN:
        if found.count(known) > 1:
            raise UsageError(f"{file} has the column {known} twice")
    columns = {}
    for column, names in COLUMNS.items():
        name = next((name for name in names if name in table), None)
        if name is not None:
            columns[column] = [_text(file, name, i, v) for i, v in enumerate(table[name])]
        elif column != "split" or any(n.strip() in names for n in found):
            shown = first_names([repr(n) if n != n.strip() else n for n in found])
            raise UsageError(f"{file} has no column {column} (it has {shown})")
    return columns, _weights(file, table["weight"]) if "weight" in table else None


def _weights(file: Path, column: list[Any]) -> NDArray[np.float64]:
    """Return the column of weights. Raises UsageError if one is no positive number."""
    for row, value in enumerate(column):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= sys.float_info.max:
            raise UsageError(f"{file}: row {row + 1} has the weight {value!r}; above 0 is needed")
    return np.array(column, np.float64)


def _columns(file: Path) -> _Columns:
    """Return the columns. Raises UsageError if the file or a column is missing, or a cell is empty."""
    stamp = file_stamp(str(file))
    if stamp is None:
        raise UsageError(f"there is no file {file}")
    return _read_columns(file, stamp)


def _read_table(file: Path) -> _Table:
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        return _json_lines(file)
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(file)
    else:
        import pyarrow as pa
        from pyarrow import csv

        text = {name: pa.string() for names in COLUMNS.values() for name in names}
        # A class may be called NA or null.
        options = csv.ConvertOptions(column_types=text, strings_can_be_null=False)
        table = csv.read_csv(file, convert_options=options)
    names = table.column_names
    return names, {name: table[name].to_pylist() for name in KNOWN if names.count(name) == 1}


def _json_lines(file: Path) -> _Table:
    """Return a table. pyarrow would want one type of each column, and make dates of names."""
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {first_line(error)}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            names |= dict.fromkeys(row)
            rows.append({name: value for name, value in row.items() if name in KNOWN})
    return list(names), {name: [row.get(name) for row in rows] for name in KNOWN & names.keys()}


def _text(file: Path, column: str, row: int, value: Any) -> str:
    if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        if not _is_encodable(str(value)):
            raise UsageError(
                f"{file}: row {row + 1} has {value!r} in column {column}, which is no text"
            )
        if column != "path" and str(value) != str(value).strip():  # another class than without
            raise UsageError(
                f"{file}: row {row + 1} has {value!r} in column {column}: remove the blank"
            )
        return str(value)
    raise UsageError(
        f"{file}: row {row + 1} has {value!r} in column {column}; a name or a whole number is needed"
    )


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False
    return True


def _require_once(file: Path, paths: list[str], rows: list[int]) -> None:
    """Raise UsageError if two paths are of one file: x and ./x, too."""
    known: dict[str, int] = {}
    for path, name, row in zip(paths, _files(file, paths), rows, strict=True):
        other = known.setdefault(name, row)
        if other != row:
            first, second = sorted((other + 1, row + 1))
            raise UsageError(f"{file}: rows {first} and {second} have the same path, {path}")


def _require_there(found: Manifest) -> None:
    """Raise UsageError if files are missing; RunError if that cannot be told."""
    files = [found.locate(i) for i in range(len(found))]
    with ThreadPoolExecutor(THREADS) as pool:
        stamps = pool.map(file_stamp, files, chunksize=1000)
        missing = [file for file, stamp in zip(files, stamps, strict=True) if stamp is None]
    if missing:
        raise UsageError(f"{found.data} lists files that are not there: {first_names(missing)}")

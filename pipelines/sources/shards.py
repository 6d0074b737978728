"""Tar shards in webdataset's format: KEY.jpg beside KEY.cls, or KEY.json with a label.

A pattern names them: `shards/{train,val}-*.tar`; a folder stands for that. An index of all samples is made
once, from the tar headers and labels, and kept beside the shards. Images are read by range, from threads.
"""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipelines.sources import tar_index
from pipelines.sources.patterns import expanded, has_splits, of_split
from pipelines.sources.source import REPORT, Source, count_text
from pipelines.sources.tar_index import Index, ShardNote
from pipelines.utils.atomic_io import atomic_write, sha256_file
from pipelines.utils.errors import DataError, UsageError, os_error_line
from pipelines.utils.output import say
from pipelines.utils.reading import Stamp, bytes_of, file_stamp, reading
from pipelines.utils.schema import TEXT, list_of, parsing, require
from pipelines.utils.text import first_names

PATTERN = "{train,val}-*.tar"  # of a folder
NAMES = 10_000  # at a time
CLASSES = "classes.json"  # beside the shards: the names of the classes, in the order of the labels


@dataclass(frozen=True, kw_only=True)
class TarShards(Source):
    """The images of one split, sorted by class and name, as in a folder.

    shards: paths. shard, offset, length: (N,) int64, where each image lies.
    """

    shards: list[str]
    keys: Any
    """(N,) names, an Arrow array in chunks: a tenth of the memory of Python's strings."""

    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    shard_stamps: Sequence[Stamp] = ()
    """The stamp that each shard had when it was opened: one that changed has other images at these places."""

    passed_over: Sequence[str] = ()
    """What the shards have that is in no sample, as text."""

    @property
    def place(self) -> str:
        """The folder, and the split."""
        return f"{self._folder} ({self.split})"

    @property
    def names(self) -> list[str]:
        """The names of the images in their shards."""
        return list(self.keys.to_pylist())

    def each_name(self) -> Iterator[str]:
        """Yield the names, some at a time: as Python's strings all would take ten times the memory."""
        for first in range(0, len(self), NAMES):
            yield from self.keys.slice(first, NAMES).to_pylist()

    @property
    def counted(self) -> str:
        """What was found, as text."""
        found = f"{count_text(len(self), len(self.classes))} in {len(self.shards)} shards"
        return "; ".join([found, *self.passed_over])

    @property
    def report(self) -> Path:
        """verified.json beside the shards."""
        return self._folder / REPORT

    @property
    def _folder(self) -> Path:
        return Path(self.shards[0]).parent

    def stamps(self) -> dict[str, Stamp]:
        """Return each image's length, and its shard's time."""
        times = [_stamp(path)[1] for path in self.shards]
        rows = zip(self.names, self.length.tolist(), self.shard.tolist(), strict=True)
        return {name: (length, times[shard]) for name, length, shard in rows}

    def read(self, index: int) -> bytes:
        """Return an image's bytes. Raises DataError if it is cut off, RunError if it cannot be read."""
        shard, offset, length = (int(x[index]) for x in (self.shard, self.offset, self.length))
        data = self._read_range(shard, offset, length)
        if len(data) < length:
            raise DataError("the shard ends within it")
        if not data:
            raise DataError("the file is empty")
        return data

    def _read_range(self, shard: int, offset: int, length: int) -> bytes:
        path = self.shards[shard]
        stamp = self.shard_stamps[shard] if self.shard_stamps else None
        with reading(path):
            # Opened each time: 10 us, of the milliseconds that decoding takes.
            return bytes_of(path, offset, length, stamp)

    def locate(self, index: int) -> str:
        """Return the shard's path and the image's name."""
        return f"{self.shards[self.shard[index]]}: {self.keys[index].as_py()}"

    def subset(self, kept: Sequence[int], split: str | None = None) -> Self:
        """Return these images alone, with all classes."""
        rows = np.asarray(kept, np.int64)
        columns = {name: getattr(self, name)[rows] for name in ("shard", "offset", "length")}
        return self._take(kept, split, keys=self.keys.take(rows), **columns)


def has_shards(folder: Path) -> bool:
    """Return whether a folder stands for its shards: it has some, and no folder train."""
    return not (folder / "train").is_dir() and any(
        paths_of(folder, split) for split in ("train", "val")
    )


def paths_of(data: Path, split: str) -> list[str]:
    """Return the shards of a split, sorted; a pattern without braces has no splits, but the same for both.

    Raises UsageError if some of a range are missing.
    """
    if data.is_dir():  # whose own path is no pattern
        return sorted(
            str(data / name) for name in glob.glob(of_split(PATTERN, split), root_dir=data)
        )
    pattern = of_split(str(data), split)
    found = {one: sorted(glob.glob(one)) for one in expanded(pattern)}
    missing = [one for one, paths in found.items() if not paths]
    if 0 < len(missing) < len(found):
        raise UsageError(f"{pattern} names shards that are not there: {first_names(missing)}")
    return list(dict.fromkeys(path for paths in found.values() for path in paths))


def list_shards(data: Path, split: str) -> list[str]:
    """Return `paths_of` a split. Raises UsageError if there are none."""
    shards = paths_of(data, split)
    if not shards:
        raise UsageError(f"no shards of {split} match {data}; expected names such as {PATTERN}")
    return shards


def has_split(data: Path, split: str) -> bool:
    """Return whether there are shards of that split, and others are not."""
    return (data.is_dir() or has_splits(str(data))) and bool(paths_of(data, split))


def open_shards(data: Path, split: str, *, with_sha256: bool = False) -> TarShards:
    """Return the images of a split. The index is made if there is none of these shards.

    with_sha256: it has the shards' SHA-256, by which copies of them are known elsewhere.

    Raises UsageError if there are no shards, or their samples lack images or labels; DataError if a shard is
    damaged; RunError if one cannot be read.
    """
    shards = list_shards(data, split)
    folder, names = Path(shards[0]).parent, tar_index.short_names(shards)
    states = [(name, *_stamp(path)) for name, path in zip(names, shards, strict=True)]
    fingerprint = tar_index.fingerprint_of(states)
    path = folder / tar_index.file_name(names)
    index = tar_index.decoded(_index_file(path))
    is_known = index is not None and index.fingerprint == fingerprint
    if index is None or not is_known:
        index = tar_index.scan(shards, lambda i: nullcontext(shards[i]), fingerprint)
    if with_sha256 and not index.shards:
        notes = [ShardNote(n, size, sha256_file(folder / n)) for n, size, _ in states]
        index, is_known = index._replace(shards=notes), False
    if not is_known:
        write_index(path, index)
    classes = class_names(str(folder / CLASSES), _content(folder / CLASSES), index.labels)
    stamps = [(size, time) for _, size, time in states]
    return TarShards(
        data=data, split=split, shards=shards, shard_stamps=stamps, **columns(index, classes)
    )


def columns(index: Index, classes: list[str] | None) -> dict[str, Any]:
    """Return the fields of `TarShards` that an index gives. classes: the names of the labels, if any."""
    column = {
        name: np.asarray(index.table[name]) for name in ("label", "shard", "offset", "length")
    }
    labels = column.pop("label")
    return {
        "classes": classes or index.labels,
        "labels": np.array([int(label) for label in index.labels])[labels] if classes else labels,
        "keys": index.table["name"],
        "passed_over": index.passed_over,
        **column,
    }


def class_names(place: str, data: bytes | None, labels: list[str]) -> list[str] | None:
    """Return the names that classes.json beside the shards gives to the labels, None without that file.

    Raises DataError if it is damaged, or has no name for a label.
    """
    if data is None:
        return None
    with parsing(place, "remove it to have the classes named by their labels"):
        names = json.loads(data)
        require("it", list_of("a list of names", TEXT), names)
    unknown = [label for label in labels if not label.isdecimal() or int(label) >= len(names)]
    if unknown:
        raise DataError(f"{place} has {len(names)} names, but labels are {first_names(unknown)}")
    return list(names)


def write_index(path: Path, index: Index) -> None:
    """Keep the index beside the shards, where that is possible."""
    try:
        atomic_write(path, tar_index.encoded(index))
    except OSError as error:
        say(f"note: the index is made anew each time: {os_error_line(error)}", sys.stderr)


def _index_file(path: Path) -> bytes | None:
    """Return an index's bytes, None if it cannot be read: then it is made anew."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _content(path: Path) -> bytes | None:
    """Return a file's bytes, None if there is none. Raises RunError."""
    try:
        with reading(path):
            return path.read_bytes()
    except OSError:
        return None


def _stamp(path: str) -> tuple[int, int]:
    """Return a shard's bytes and time. Raises DataError, RunError."""
    stamp = file_stamp(path)
    if stamp is None:
        raise DataError(f"there is no file {path}")
    return stamp

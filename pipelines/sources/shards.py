"""Tar shards in webdataset's format: KEY.jpg beside KEY.cls, or KEY.json with a label.

A pattern names them: `shards/{train,val}-*.tar`; a folder stands for that. An index of all samples is made
once, from the tar headers and labels, and kept beside the shards. Images are read by range, from threads.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pipelines.image_io import SUFFIXES
from pipelines.sources.source import (
    REPORT,
    Source,
    Stamp,
    count_text,
    file_stamp,
    indices_of,
    ordered_classes,
)
from pipelines.utils.atomic_io import atomic_write
from pipelines.utils.errors import DataError, UsageError, first_line, os_error_line
from pipelines.utils.output import say
from pipelines.utils.reading import reading
from pipelines.utils.schema import TEXT, list_of, parsing, read_json, require
from pipelines.utils.text import first_names

PATTERN = "{train,val}-*.tar"  # of a folder
CLASSES = "classes.json"  # beside the shards: the names of the classes, in the order of the labels
LABELS = ("cls", "json")
INDEX = ".{}.index.parquet"  # beside the shards; by the shards' names
VERSION = b"1"  # of the index
BLOCK = 512  # bytes, tar's unit; zeros end a file


class Sample(NamedTuple):
    """Where an image lies."""

    name: str
    shard: int
    offset: int
    length: int
    label: str


@dataclass(frozen=True)
class TarShards(Source):
    """The images of one split, sorted by class and name, as in a folder.

    shards: paths. shard, offset, length: (N,) int64, where each image lies.
    """

    shards: list[str]
    keys: Any
    """(N,) names, an Arrow array: a tenth of the memory of Python's strings."""

    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]

    @property
    def place(self) -> str:
        """The folder, and the split."""
        return f"{self._folder} ({self.split})"

    @property
    def names(self) -> list[str]:
        """The names of the images in their shards."""
        return list(self.keys.to_pylist())

    @property
    def counted(self) -> str:
        """What was found, as text."""
        return f"{count_text(len(self), len(self.classes))} in {len(self.shards)} shards"

    @property
    def report(self) -> Path:
        """verified.json beside the shards."""
        return self._folder / REPORT

    @property
    def _folder(self) -> Path:
        return Path(self.shards[0]).parent

    def stamps(self) -> dict[str, Stamp]:
        """Return each image's length, and its shard's time."""
        times = [_state(path)[1] for path in self.shards]
        rows = zip(self.names, self.length.tolist(), self.shard.tolist(), strict=True)
        return {name: (length, times[shard]) for name, length, shard in rows}

    def read(self, index: int) -> bytes:
        """Return an image's bytes. Raises DataError if it is cut off, RunError if it cannot be read."""
        length, offset = int(self.length[index]), int(self.offset[index])
        path = self.shards[self.shard[index]]
        with reading(path):
            file = os.open(path, os.O_RDONLY)  # 10 us, of the milliseconds that decoding takes
            try:
                data = os.pread(file, length, offset)
            finally:
                os.close(file)
        if len(data) < length:
            raise DataError("the shard ends within it")
        if not data:
            raise DataError("the file is empty")
        return data

    def locate(self, index: int) -> str:
        """Return the shard's path and the image's name."""
        return f"{self.shards[self.shard[index]]}: {self.keys[index].as_py()}"

    def subset(self, kept: Sequence[int], split: str | None = None) -> Self:
        """Return these images alone, with all classes."""
        rows = np.asarray(kept, np.int64)
        columns = {name: getattr(self, name)[rows] for name in ("shard", "offset", "length")}
        return self._take(kept, split, keys=self.keys.take(rows), **columns)


def is_pattern(data: Path) -> bool:
    """Return whether a path is meant for shards."""
    return data.suffix == ".tar" or bool(re.search(r"[*?{]", str(data)))


def has_shards(folder: Path) -> bool:
    """Return whether a folder stands for its shards: it has some, and no folder train."""
    return not (folder / "train").is_dir() and any(
        paths_of(folder, split) for split in ("train", "val")
    )


def paths_of(data: Path, split: str) -> list[str]:
    """Return the shards of a split, sorted; a pattern without braces has no splits, but the same for both."""
    pattern = str(data / PATTERN if data.is_dir() else data)
    braces = re.search(r"\{([^{},]*),([^{},]*)\}", pattern)
    if braces is None:
        return sorted(glob.glob(pattern))
    name = braces[1] if split == "train" else braces[2]
    return sorted(glob.glob(pattern[: braces.start()] + name + pattern[braces.end() :]))


def has_split(data: Path, split: str) -> bool:
    """Return whether there are shards of that split, and others are not."""
    return (data.is_dir() or "{" in str(data)) and bool(paths_of(data, split))


def open_shards(data: Path, split: str) -> TarShards:
    """Return the images of a split. The index is made if there is none of these shards.

    Raises UsageError if there are no shards, or their samples lack images or labels; DataError if a shard is
    damaged; RunError if one cannot be read.
    """
    shards = paths_of(data, split)
    if not shards:
        raise UsageError(f"no shards of {split} match {data}; expected names such as {PATTERN}")
    folder, names = Path(shards[0]).parent, [Path(path).name for path in shards]
    states = [(name, *_state(path)) for name, path in zip(names, shards, strict=True)]
    fingerprint = hashlib.sha256(repr(states).encode()).hexdigest()
    index = folder / INDEX.format(hashlib.sha256("\n".join(names).encode()).hexdigest()[:12])
    found = _read_index(index, fingerprint)
    if found is None:
        found = _scan(shards)
        _write_index(index, found, fingerprint)
    table, labels = found
    classes = _class_names(folder, labels)
    column = {name: np.asarray(table[name]) for name in ("label", "shard", "offset", "length")}
    return TarShards(
        classes=classes or labels,
        labels=np.array([int(label) for label in labels])[column["label"]]
        if classes
        else column["label"],
        split=split,
        data=data,
        shards=shards,
        keys=table["name"].combine_chunks(),
        shard=column["shard"],
        offset=column["offset"],
        length=column["length"],
    )


# A table of the samples, and the distinct labels, as text, of which its column has the places.
_Index = tuple[Any, list[str]]


def _scan(shards: list[str]) -> _Index:
    """Read the headers and labels of all shards."""
    import pyarrow as pa

    samples: list[Sample] = []
    for i, path in enumerate(shards):
        samples += samples_of(path, i)
    labels = ordered_classes(sample.label for sample in samples)
    place = {label: i for i, label in enumerate(labels)}
    if len({sample.name for sample in samples}) < len(samples):  # each shard counts anew
        samples = [s._replace(name=f"{Path(shards[s.shard]).name}/{s.name}") for s in samples]
    samples.sort(key=lambda sample: (place[sample.label], sample.name))
    return (
        pa.table(
            {
                "name": pa.array([sample.name for sample in samples]),
                "shard": np.array([sample.shard for sample in samples], np.int64),
                "offset": np.array([sample.offset for sample in samples], np.int64),
                "length": np.array([sample.length for sample in samples], np.int64),
                "label": indices_of([sample.label for sample in samples], labels),
            }
        ),
        labels,
    )


def samples_of(path: str, shard: int) -> list[Sample]:
    """Return the samples of a shard. Raises UsageError, DataError, RunError."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    others: Counter[str] = Counter()
    for member, data in _members(path):
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = folder + slash + stem
        if f".{extension.lower()}" in SUFFIXES:
            if key in images:
                raise UsageError(
                    f"{path}: {key} has two images, {images[key].name} and {member.name}"
                )
            images[key] = member
        elif extension in LABELS and key not in labels:
            if (label := _label(extension, data())) is not None:
                labels[key] = label
        else:
            others[extension] += 1
    if not images:
        kinds = first_names([f"{kind} {count}" for kind, count in others.most_common()])
        raise UsageError(f"{path} has no images (it has {kinds})")
    for key, member in images.items():
        if key not in labels:
            raise UsageError(
                f"{path}: {member.name} has no label; expected {key}.cls, or {key}.json with a label"
            )
    return [
        Sample(member.name, shard, member.offset_data, member.size, labels[key])
        for key, member in images.items()
    ]


def _members(path: str) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Yield each file of a tar, and what reads it. Raises DataError if the tar is damaged or cut off."""
    try:
        with (
            reading(path),
            Path(path).open("rb") as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for member in tar:
                start, size = member.offset_data, member.size
                if start + size > os.fstat(file.fileno()).st_size:
                    raise DataError(f"{path} is cut off within {member.name}")
                if member.isreg():
                    yield member, partial(os.pread, file.fileno(), size, start)
                tar.members.clear()  # type: ignore[attr-defined] # it would keep them all
            if os.pread(file.fileno(), BLOCK, tar.offset) not in (bytes(BLOCK), b""):
                raise DataError(f"{path} is damaged at byte {tar.offset}")
    except tarfile.TarError as error:
        raise DataError(f"{path} is no tar file, or damaged: {first_line(error)}") from None


def _label(extension: str, data: bytes) -> str | None:
    """Return the label of a .cls or .json file, None if there is none in it."""
    text = data.decode(errors="replace").strip()
    if extension == "cls":
        return text or None
    try:
        label = json.loads(text).get("label")
    except (ValueError, AttributeError, RecursionError):
        return None
    return str(label) if isinstance(label, int | str) else None


def _class_names(folder: Path, labels: list[str]) -> list[str] | None:
    """Return the names that classes.json beside the shards gives to the labels, None without that file.

    Raises DataError if it is damaged, or has no name for a label.
    """
    path = folder / CLASSES
    if not path.exists():
        return None
    remedy = "remove it to have the classes named by their labels"
    with parsing(path, remedy):
        names = read_json(path, remedy)
        require("it", list_of("a list of names", TEXT), names)
    unknown = [label for label in labels if not label.isdecimal() or int(label) >= len(names)]
    if unknown:
        raise DataError(f"{path} has {len(names)} names, but labels are {first_names(unknown)}")
    return list(names)


def _read_index(path: Path, fingerprint: str) -> _Index | None:
    """Return the index, None if there is none of these shards in this state."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        notes = table.schema.metadata or {}
        if notes.get(b"fingerprint") != fingerprint.encode() or notes.get(b"version") != VERSION:
            return None
        return table, json.loads(notes[b"labels"])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None


def _write_index(path: Path, index: _Index, fingerprint: str) -> None:
    """Keep the index beside the shards, where that is possible."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, labels = index
    notes = {"fingerprint": fingerprint, "labels": json.dumps(labels), "version": VERSION}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(notes), sink)
    try:
        atomic_write(path, sink.getvalue().to_pybytes())
    except OSError as error:
        say(f"note: the index is made anew each time: {os_error_line(error)}", sys.stderr)


def _state(path: str) -> tuple[int, int]:
    """Return a shard's bytes and time. Raises DataError, RunError."""
    stamp = file_stamp(path)
    if stamp is None:
        raise DataError(f"there is no file {path}")
    return stamp

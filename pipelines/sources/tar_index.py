"""The index of tar shards: where each image lies, found by reading tar headers and labels alone.

It is a Parquet file beside the shards, with notes of the shards that it is of.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.image_io import SUFFIXES
from pipelines.sources.source import indices_of, ordered_classes
from pipelines.utils.errors import DataError, UsageError, first_line
from pipelines.utils.reading import reading
from pipelines.utils.text import encodable, first_names

LABELS = ("cls", "json")
NAME = ".{}.index.parquet"  # beside the shards; by the shards' names
# 2: hard links are samples, negative numbers keep their order, and what lies behind a tar's end is an error.
# Shards that `rsnet shards` wrote, whose index notes them, have none of these.
VERSION = b"2"
WITHOUT_IMAGE = "labels without an image"
DOTTED = "images of no key, as their names have further dots"
OTHER_LABEL = "labels in .json that are other than those in .cls, which are taken"
BLOCK = 512  # bytes, tar's unit; zeros end a file
CHUNK = 1 << 20  # bytes that are read at once behind the end


class Sample(NamedTuple):
    """Where an image lies."""

    name: str
    shard: int
    offset: int
    length: int
    label: str


class ShardNote(NamedTuple):
    """What a shard was like when its index was made."""

    name: str
    size: int
    sha256: str


class Index(NamedTuple):
    """The samples of a split, sorted by label and name.

    table: columns name, shard, offset, length, label, the place in `labels`: the distinct labels, as text.
    fingerprint: of the shards' states, as their file system knows them. shards: may be empty. passed_over:
    what the shards have that is in no sample, as text.
    """

    table: Any
    labels: list[str]
    fingerprint: str
    shards: list[ShardNote]
    passed_over: Sequence[str] = ()


class PassedOver:
    """What is in no sample, by kind: how many, and where the first is."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, where: str) -> None:
        """Count one."""
        self._counts[kind] += 1
        self._first.setdefault(kind, where)

    def texts(self) -> list[str]:
        """Return a text for each kind."""
        return [
            f"{kind}: {n} (the first is {self._first[kind]})" for kind, n in self._counts.items()
        ]


def fingerprint_of(states: Sequence[tuple[Any, ...]]) -> str:
    """Return the SHA-256 of the shards' names, sizes and times, or what else tells a change."""
    return hashlib.sha256(repr(states).encode()).hexdigest()


def short_names(shards: Sequence[str]) -> list[str]:
    """Return the ends of paths or URLs by which they differ: the names of the files, if these do."""
    parts = [shard.split("/") for shard in shards]
    for count in range(1, max(map(len, parts), default=0) + 1):
        ends = ["/".join(part[-count:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return list(shards)


def file_name(shards: Sequence[str]) -> str:
    """Return the name of the index of shards of these `short_names`."""
    return NAME.format(hashlib.sha256("\n".join(shards).encode()).hexdigest()[:12])


def scan(
    shards: Sequence[str],
    held: Callable[[int], AbstractContextManager[str]],
    fingerprint: str,
) -> Index:
    """Read the headers and labels of all shards.

    shards: paths or URLs, for messages. held: gives the path of a shard's file, in a block.

    Raises UsageError if samples lack images or labels, DataError if a shard is damaged, RunError if it cannot
    be read.
    """
    import pyarrow as pa

    samples: list[Sample] = []
    passed_over = PassedOver()
    for i, place in enumerate(shards):
        with held(i) as path:
            samples += samples_of(path, i, place, passed_over)
    labels = ordered_classes(sample.label for sample in samples)
    place_of = {label: i for i, label in enumerate(labels)}
    if len({sample.name for sample in samples}) < len(samples):  # each shard counts anew
        names = short_names(shards)
        samples = [s._replace(name=f"{names[s.shard]}/{s.name}") for s in samples]
    samples.sort(key=lambda sample: (place_of[sample.label], sample.name))
    table = pa.table(
        {
            "name": pa.array([sample.name for sample in samples]),
            "shard": np.array([sample.shard for sample in samples], np.int64),
            "offset": np.array([sample.offset for sample in samples], np.int64),
            "length": np.array([sample.length for sample in samples], np.int64),
            "label": indices_of([sample.label for sample in samples], labels),
        }
    )
    return Index(table, labels, fingerprint, [], passed_over.texts())


def samples_of(
    path: str, shard: int, place: str | None = None, passed_over: PassedOver | None = None
) -> list[Sample]:
    """Return the samples of a shard; `place` is what messages call it. Raises as `scan`."""
    place = place or path
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, dict[str, str]] = {kind: {} for kind in LABELS}
    others: dict[str, list[str]] = {}
    kinds: Counter[str] = Counter()
    for member, data in _members(path, place):
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = folder + slash + stem, extension.lower()  # as webdataset has them
        if f".{extension}" in SUFFIXES:
            if key in images:
                raise UsageError(
                    f"{place}: {key} has two images, {images[key].name} and {member.name}"
                )
            images[key] = member
        elif extension in LABELS:
            if key in labels[extension]:
                raise UsageError(f"{place}: {key}.{extension} is there twice")
            labels[extension][key] = _label(extension, data())
        else:
            others.setdefault(key, []).append(member.name)
        kinds[extension] += 1
    if not images:
        found = first_names([f"{kind} {count}" for kind, count in kinds.most_common()])
        raise UsageError(f"{place} has no images (it has {found})")
    _note_passed_over(place, images, labels, others, passed_over or PassedOver())
    samples = []
    for key, member in images.items():
        label = labels["cls"].get(key) or labels["json"].get(key)
        if not label:
            raise UsageError(
                f"{place}: {member.name} has no label; expected {key}.cls, or {key}.json with a label"
            )
        name = encodable(member.name)
        samples.append(Sample(name, shard, member.offset_data, member.size, label))
    return samples


def _note_passed_over(
    place: str,
    images: Mapping[str, Any],
    labels: Mapping[str, Mapping[str, str]],
    others: Mapping[str, Sequence[str]],
    passed_over: PassedOver,
) -> None:
    """Note labels without an image, those of two that are not taken, and images that have no key.

    others: by key, the files that are neither.
    """
    shard, cls = Path(place).name, labels["cls"]
    for kind, by_key in labels.items():
        for key, label in by_key.items():
            is_in_cls = kind == "json" and bool(cls.get(key))  # KEY.json beside KEY.cls counts once
            if label and key not in images and not is_in_cls:
                beside = f", beside {others[key][0]}" if key in others else ""
                passed_over.add(WITHOUT_IMAGE, f"{key}.{kind} in {shard}{beside}")
    for key, label in labels["json"].items():
        taken = cls.get(key)
        if taken and label and taken != label and taken.isdecimal() == label.isdecimal():
            passed_over.add(OTHER_LABEL, f"{key} in {shard}")
    for key, names in others.items():
        # As of .DS_Store, whose name begins with its dot.
        is_hidden = key == "" or key.endswith("/")
        if key not in images and not is_hidden:
            for name in names:
                if name.lower().endswith(SUFFIXES):
                    passed_over.add(DOTTED, f"{name} in {shard}")


def _members(path: str, place: str) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Yield each file of a tar, and what reads it. Raises DataError if the tar is damaged or cut off."""
    try:
        with (
            reading(place),
            Path(path).open("rb") as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            regular: dict[str, tuple[int, int]] = {}  # where the target of a hard link lies
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined] # it would keep them all
                if member.issparse():
                    raise DataError(
                        f"{place}: {member.name} is stored sparse: write it without tar -S"
                    )
                if member.islnk() and (target := regular.get(_path_in(member.linkname))):
                    member.offset_data, member.size = target
                elif member.islnk() or member.issym():
                    _require_no_sample(member, place)
                    continue
                start, size = member.offset_data, member.size
                if start + size > os.fstat(file.fileno()).st_size:
                    raise DataError(f"{place} is cut off within {member.name}")
                if member.isreg() or member.islnk():
                    regular[_path_in(member.name)] = start, size
                    yield member, partial(os.pread, file.fileno(), size, start)
            _require_end(file.fileno(), tar.offset, place)
    except tarfile.TarError as error:
        raise DataError(f"{place} is no tar file, or damaged: {first_line(error)}") from None


def _path_in(name: str) -> str:
    """Return a path in a tar as links and members alike may have it: ./a and /a are a."""
    return os.path.normpath(name).lstrip("/")


def _require_no_sample(link: tarfile.TarInfo, place: str) -> None:
    """Raise DataError for a link whose target is unknown, if it is an image or a label by its name."""
    stem, _, extension = link.name.rpartition("/")[2].lower().partition(".")
    if stem and (extension in LABELS or f".{extension}" in SUFFIXES):
        raise DataError(
            f"{place}: {link.name} is a link to {link.linkname}: write the shard with tar -h "
            "--hard-dereference"
        )


def _require_end(file: int, end: int, place: str) -> None:
    """Raise DataError unless a tar ends with zeros from byte `end` on, at which tarfile ends it.

    Behind the first block of zeros it reads nothing: a second tar that was appended by cat, or what follows
    a part that a download left out.
    """
    at = end
    while data := os.pread(file, CHUNK, at):
        if data.count(0) < len(data):
            first = at + len(data) - len(data.lstrip(b"\0"))
            where = "is damaged" if first < end + BLOCK else "goes on behind its end"
            raise DataError(f"{place} {where} at byte {first}: write it anew")
        at += len(data)
    if at == end:
        raise DataError(f"{place} is cut off: tar's end is not there; write it anew")


def _label(extension: str, data: bytes) -> str:
    """Return the label of a .cls or .json file, "" if there is none in it."""
    text = data.decode("utf-8-sig", errors="replace").strip()  # a byte order mark is no label
    if extension == "cls":
        return text
    try:
        label = json.loads(text).get("label")
    except (ValueError, AttributeError, RecursionError):
        return ""
    return str(label) if isinstance(label, int | str) else ""


def decoded(data: bytes | None) -> Index | None:
    """Return the index in a file's bytes, None if there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if data is None:
        return None
    try:
        with _system_memory():
            file = pq.ParquetFile(pa.BufferReader(data))
            # One at a time: all columns at once take twice the memory while they are decoded.
            columns = {
                name: file.read([name], use_threads=False).column(0)
                for name in file.schema_arrow.names
            }
        table, notes = pa.table(columns), file.schema_arrow.metadata or {}
        shards = [ShardNote(*note) for note in json.loads(notes.get(b"shards", b"[]"))]
        if notes.get(b"version") != VERSION and not (shards and notes.get(b"version") == b"1"):
            return None
        labels, fingerprint = json.loads(notes[b"labels"]), notes[b"fingerprint"].decode()
        # Files of earlier versions have none.
        passed_over = json.loads(notes.get(b"passed_over", b"[]"))
        return Index(table, labels, fingerprint, shards, passed_over)
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
        return None


@contextmanager
def _system_memory() -> Iterator[None]:
    """Let Arrow allocate as all else does: its own keeps 30 MB that 100,000 samples took for a moment."""
    import pyarrow as pa

    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def encoded(index: Index) -> bytes:
    """Return the bytes of an index's file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    notes = {
        "fingerprint": index.fingerprint,
        "labels": json.dumps(index.labels),
        "shards": json.dumps(index.shards),
        "passed_over": json.dumps(index.passed_over),
        "version": VERSION,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(index.table.replace_schema_metadata(notes), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data

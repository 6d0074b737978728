"""`rsnet shards`: write images as tar shards, their bytes as they are.

Shards hold a fixed random order, so that other readers, which take them from front to back, see all classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.image_formats import open_image
from pipelines.image_io import SUFFIXES
from pipelines.sources.shards import CLASSES, open_shards
from pipelines.sources.source import Source
from pipelines.sources.tar_index import samples_of
from pipelines.utils.atomic_io import (
    atomic_write,
    atomic_write_json,
    fsync,
    fsync_directory,
    remove_partial,
)
from pipelines.utils.errors import DataError, UsageError, first_line, way_out
from pipelines.utils.locks import exclusive_lock
from pipelines.utils.output import say
from pipelines.utils.output_folder import make_folder, require_space
from pipelines.utils.progress import ProgressBar, format_bytes
from pipelines.utils.schema import read_json

NOTES = "shards.json"  # in the folder: what was written, to go on after an interruption
SEED = 0  # of the order in the shards
OVERHEAD = 2560  # bytes of tar per sample: two headers, the label's block, the padding of the image


def write_shards(train: Source, val: Source, output: Path, shard_bytes: int) -> None:
    """Write the shards of both splits into the folder `output`, each of `shard_bytes` at most.

    Raises UsageError for other files in the way, RunError for a lack of space, DataError for an image that
    is missing or a shard that cannot be written.
    """
    make_folder(output)
    taken = f"--output: another command is writing into {output}"
    with exclusive_lock(output / ".lock", taken, remove=True):
        _write_all(output, [train, val], shard_bytes)


def _write_all(output: Path, sources: list[Source], shard_bytes: int) -> None:
    sizes = {source.split: _sizes(source) for source in sources}
    plans = {source.split: list(_plan(sizes[source.split], shard_bytes)) for source in sources}
    notes = {
        "shard_size": shard_bytes,
        "images": {s.split: [len(s), _digest(s, sizes[s.split])] for s in sources},
    }
    _check_folder(output, notes, total=sum(map(sum, sizes.values())))
    try:
        atomic_write_json(output / NOTES, notes)
        atomic_write(output / CLASSES, (json.dumps(sources[0].classes) + "\n").encode())
        for source in sources:
            _write_split(output, source, plans[source.split])
            open_shards(output, source.split, with_sha256=True)  # makes the index
    except OSError as error:
        place = error.filename or output
        raise DataError(
            f"cannot write {place}: {error.strerror or first_line(error)}{way_out(error)}"
        ) from None


def _check_folder(output: Path, notes: dict[str, Any], total: int) -> None:
    """Raise RunError if the shards do not fit, UsageError if the folder has others than the beginning of
    these.
    """
    path, advice = output / NOTES, "name an empty folder"
    there = sorted(output.glob("*.tar"))
    known = read_json(path, advice) if path.exists() else {}
    is_ours = isinstance(known, dict) and known.keys() == notes.keys()
    if there and is_ours and known != notes:
        raise UsageError(f"--output: {output} has shards of other images or another size; {advice}")
    taken = ["shards"] if there else [n for n in (NOTES, CLASSES) if (output / n).exists()]
    if taken and not is_ours:
        raise UsageError(f"--output: {output} has {taken[0]} already; {advice}")
    for split in notes["images"] if is_ours else ():
        for partial in output.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9][0-9].tar.partial"):
            remove_partial(partial)
    require_space(output, total - sum(shard.stat().st_size for shard in there))


def _write_split(output: Path, source: Source, plan: list[list[int]]) -> None:
    names = source.names
    keys = _keys(names)
    paths = [output / f"{source.split}-{number:06}.tar" for number in range(len(plan))]
    missing = [rows for path, rows in zip(paths, plan, strict=True) if not path.exists()]
    source.expect(np.array([*itertools.chain(*missing)], np.int64))
    done = size = 0
    with ProgressBar(source.split, len(source)) as progress:
        for path, rows in zip(paths, plan, strict=True):
            if not path.exists():
                samples = [(row, keys[row], suffix_of(names[row])) for row in rows]
                _write_shard(path, source, samples)
            done, size = done + len(rows), size + path.stat().st_size
            progress.update(done, size, 0)
    say(
        f"{output}: {len(source)} images in {len(plan)} shards of {source.split}, {format_bytes(size)}"
    )


def _write_shard(path: Path, source: Source, samples: list[tuple[int, str, str]]) -> None:
    """Write a shard under a temporary name, read it back, and rename it. Raises DataError, OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for row, key, suffix in samples:
                    image = source.read_or_explain(row)
                    _add(
                        tar,
                        f"{key}{suffix or _suffix_by_content(source.locate(row), image)}",
                        image,
                    )
                    _add(tar, f"{key}.cls", str(source.labels[row]).encode())
            file.flush()
            fsync(file.fileno(), partial)
        _read_back(partial, source, [row for row, _, _ in samples])
        partial.rename(path)
        fsync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _read_back(partial: Path, source: Source, rows: list[int]) -> None:
    """Raise DataError unless the shard has these samples, in this order."""
    written = samples_of(str(partial), 0)
    with partial.open("rb") as file:
        for sample, row in zip(written, rows, strict=True):
            same = sample.label == str(source.labels[row])
            if not same or os.pread(file.fileno(), sample.length, sample.offset) != source.read(
                row
            ):
                raise DataError(
                    f"{partial}: {sample.name} does not read back as it was written; is the disk sound?"
                )


def _sizes(source: Source) -> list[int]:
    """Return the bytes that each sample takes in a shard, at most."""
    stamps = source.stamps().values()
    return [OVERHEAD + (0 if stamp is None else stamp[0]) for stamp in stamps]


def _digest(source: Source, sizes: list[int]) -> str:
    """Return the SHA-256 of what decides which shard has which samples, and of their labels."""
    digest = hashlib.sha256(source.fingerprint().encode())
    digest.update(json.dumps(source.classes).encode())
    digest.update(np.array(sizes, np.int64).tobytes() + source.labels.tobytes())
    return digest.hexdigest()


def _plan(sizes: list[int], most: int) -> Iterator[list[int]]:
    """Yield the samples of each shard, of `most` bytes, in a random order that is always the same."""
    rows: list[int] = []
    total = 0
    for row in np.random.default_rng(SEED).permutation(len(sizes)).tolist():
        if rows and total + sizes[row] > most:
            yield rows
            rows, total = [], 0
        rows.append(row)
        total += sizes[row]
    yield rows


def _keys(names: list[str]) -> list[str]:
    """Return the name of each image without its suffix, each once: what webdataset calls a key.

    It ends at the first dot of the file's name, so there may be no other; nor may it lead out of a folder.
    """
    keys: list[str] = []
    known: set[str] = set()
    for name in names:
        folders, _, base = name.rpartition("/")
        stem = base.removesuffix(suffix_of(name)).replace(".", "_")
        parts = [part for part in folders.split("/") if part not in ("", ".", "..")]
        key = plain = "/".join([*parts, stem])
        for number in itertools.count(2):
            if key not in known:
                break
            key = f"{plain}_{number}"
        known.add(key)
        keys.append(key)
    return keys


def suffix_of(name: str) -> str:
    """Return the suffix of an image's name, as it is written; "" if it has none of an image."""
    suffix = Path(name).suffix
    return suffix if suffix.lower() in SUFFIXES else ""


def _suffix_by_content(place: str, image: bytes) -> str:
    """Return the suffix of an image whose name has none. Raises DataError if it is none of a shard's."""
    try:
        with open_image(image) as opened:
            # Phones' JPEGs of several pictures are MPO.
            suffix = f".{(opened.format or 'JPEG').lower()}".replace(".mpo", ".jpg")
    except DataError as error:
        raise DataError(f"broken image {place}: {error}") from None
    if suffix not in SUFFIXES:
        raise DataError(f"{place}: shards have no {suffix[1:].upper()} images: save it as PNG")
    return suffix

"""Convert images to .beton files, each complete and checked, or not written at all.

Samples are stored in the order of their source, so that the same (seed, epoch) gives the same images and
crops as the other pipelines. An image's own bytes are stored wherever the loader's decoder takes them, else
it is encoded anew. The same images and options give the same bytes, whatever the number of threads: threads
encode, this one writes, and there is no worker process that could die unnoticed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.ffcv.beton import (
    PAGE_SIZE,
    BetonWriter,
    open_beton,
    table_sha256,
)
from pipelines.ffcv.encoder import Encoded, Encoder, Settings
from pipelines.ffcv.options import ConvertOptions
from pipelines.ffcv.sidecar import (
    Sidecar,
    check_sidecar,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from pipelines.ffcv.verify import reasons, stored_bytes
from pipelines.sampler import Indices
from pipelines.sources.folder import require_apart_of_both
from pipelines.sources.options import NO_OPTIONS
from pipelines.sources.source import Source
from pipelines.sources.splits import announce, open_split, open_splits, warn_of_lost_weights
from pipelines.utils.atomic_io import (
    fsync,
    fsync_directory,
    remove_partial,
    sha256_file,
)
from pipelines.utils.errors import DataError, UsageError, error_context, way_out
from pipelines.utils.locks import exclusive_lock
from pipelines.utils.output import say
from pipelines.utils.output_folder import make_folder, require_space
from pipelines.utils.progress import ProgressBar, format_bytes
from pipelines.utils.reading import cannot_read
from pipelines.utils.thread_map import ordered_map

PROBES = 64  # images that are encoded for the estimate, and compared after writing
LOCK = ".lock"  # in the output folder while a conversion writes into it


def convert(options: ConvertOptions, data: str | Path, output: Path) -> None:
    """Write `output`/SPLIT.beton for each of the splits, unless the same file is there already.

    Raises UsageError for a malformed folder or another file in the way, RunError for a lack of space,
    DataError for a broken image without --skip-bad or a file that cannot be written.
    """
    splits = _scan_splits(options, data)  # before anything is created
    require_apart_of_both(output, data, options.placed)
    make_folder(output)
    with _locked(output):
        splits = [split for split in splits if not _is_there(output, split, options)]
        for split in splits:
            remove_partial(_partial(output, split))
        encoder = Encoder(options)
        _check_space(output, splits, encoder, options.workers)
        for split in splits:
            _convert_split(output, split, encoder, options)


@dataclass(frozen=True)
class _Split:
    """The images of one split that are to be stored."""

    source: Source
    chosen: Indices
    sizes: NDArray[np.int64]
    """(N,) bytes of each of the source's images; 0 if it is missing, which reading it will say."""

    @property
    def name(self) -> str:
        return self.source.split

    @property
    def bytes(self) -> int:
        """Of all that are to be stored."""
        return int(self.sizes[self.chosen].sum())

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the images' names and sizes."""
        digest = hashlib.sha256()
        for i in self.chosen.tolist():
            line = f"{self.names[i]}\0{self.sizes[i]}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def labels_without(self, skipped: Sequence[Mapping[str, str]]) -> NDArray[np.int64]:
        """Return the labels of the images to be stored, but for those that a sidecar says were not."""
        names = {item["image"] for item in skipped}
        kept = [i for i in self.chosen.tolist() if self.names[i] not in names]
        return self.source.labels[kept]

    @property
    def probes(self) -> Indices:
        """A few of the images, spread over the classes."""
        return _spread(self.chosen, PROBES)

    @cached_property
    def names(self) -> list[str]:
        """The images' names, in a folder the paths below the split's."""
        return self.source.names


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the lock of the output folder, which the kernel releases however this process ends.

    Raises UsageError if another conversion holds it.
    """
    if not os.access(output, os.W_OK):  # nor can another conversion; the files may be there already
        yield
        return
    taken = f"--output: another conversion is writing into {output}"
    with exclusive_lock(output / LOCK, taken, remove=True):
        yield


def _scan_splits(options: ConvertOptions, data: str | Path) -> list[_Split]:
    """Return the splits' images. Raises UsageError if one is malformed or the classes differ."""
    wanted = options.splits
    if set(wanted) == {"train", "val"} or options.placed != NO_OPTIONS:
        train, val = open_splits(data, options.placed, cache=options)
        assert train is not None
        sources: dict[str, Source] = {"train": train, "val": val}
    else:
        with error_context("--data"):
            sources = {split: open_split(data, split, options) for split in wanted}
    announce(*(sources[split] if split in wanted else None for split in ("train", "val")))
    if "train" in wanted:
        warn_of_lost_weights(sources["train"])
    splits = []
    for source in (sources[split] for split in wanted):
        every = np.arange(len(source))
        chosen = every if options.subset is None else _spread(every, options.subset)
        sizes = [0 if stamp is None else stamp[0] for stamp in source.stamps().values()]
        splits.append(_Split(source, chosen, np.array(sizes, np.int64)))
    return splits


def _spread(indices: Indices, count: int) -> Indices:
    """Return `count` of the indices, evenly spaced: as folders are sorted by class, over all classes."""
    count = min(count, len(indices))
    return indices[np.arange(count) * len(indices) // count]


def _is_there(output: Path, split: _Split, options: ConvertOptions) -> bool:
    """Return whether the file exists already, made from the same images with the same options.

    Raises UsageError if it was made differently, or has other images than --skip-bad and --strict say;
    DataError if it is broken.
    """
    path = output / f"{split.name}.beton"
    if not path.exists():
        return False
    found = read_sidecar(path)
    others = UsageError(
        f"--output: {path} exists already, made from other images or with other options; "
        "remove it, or give another folder"
    )
    if (
        found is None
        or found.settings != dataclasses.asdict(Settings.of(options))
        or found.source.get("fingerprint") != split.fingerprint
        or found.classes != split.source.classes
    ):
        raise others
    if options.strict and (faulty := found.faulty):
        raise UsageError(
            f"--output: {path} exists already, with {len(faulty)} images that decode with errors; "
            "remove it, or leave --strict out"
        )
    if found.skipped and not options.skip_bad:
        raise UsageError(
            f"--output: {path} exists already, but {found.lacks}; remove it to have them converted, too, "
            "or add --skip-bad"
        )
    beton = open_beton(path)
    check_sidecar(found, beton)
    if not np.array_equal(beton.labels, split.labels_without(found.skipped)):
        raise others
    say(
        f"{path}: exists already, converted with the same options from images of the same names and sizes"
    )
    for line in found.remarks:
        say(f"{path}: {line}")
    return True


def _partial(output: Path, split: _Split) -> Path:
    """Return the name of a split's file until it is complete."""
    return output / f"{split.name}.beton.partial"


def _check_space(output: Path, splits: list[_Split], encoder: Encoder, workers: int) -> None:
    """Raise RunError if the files will not fit on the disk, estimated from a few encoded images."""
    total = 0.0
    for split in splits:
        probes = split.probes
        before, after = 0, 0
        for index, encoded in zip(probes, _encode(split, probes, encoder, workers), strict=True):
            if isinstance(encoded, Encoded):
                before += split.sizes[index]
                after += encoded.stored.data.size
        # One page for the tables; 5 % because pages are not filled to their ends.
        size = PAGE_SIZE + 1.05 * split.bytes * after / max(before, 1)
        say(f"{split.name}: {len(split.chosen)} images of {format_bytes(split.bytes)}, "
              f"about {format_bytes(size)} to write")  # fmt: skip
        total += size
    require_space(output, total)


def _convert_split(output: Path, split: _Split, encoder: Encoder, options: ConvertOptions) -> None:
    """Write one split under a temporary name, check it, and rename it. Raises DataError."""
    final, partial = output / f"{split.name}.beton", _partial(output, split)
    started = time.perf_counter()
    try:
        skipped, stored, encoded = _write(partial, split, encoder, options)
        _read_back(partial, split, skipped, encoder, options.workers)
        content = Sidecar(
            samples=len(split.chosen) - len(skipped),
            classes=split.source.classes,
            settings=dataclasses.asdict(Settings.of(options)),
            bytes=partial.stat().st_size,
            sha256=sha256_file(partial),
            source={"images": len(split.chosen), "fingerprint": split.fingerprint},
            stored=stored,
            skipped=[
                {"image": split.names[index], "reason": reason} for index, reason in skipped.items()
            ],
            encoded=encoded,
            table_sha256=table_sha256(partial),
        )
        # In this order, so that there is never a .beton file without its sidecar.
        write_sidecar(sidecar_path(final), content)
        partial.rename(final)
        fsync_directory(output)
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or partial}: {error.strerror or error}{way_out(error)}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    speed = content.samples / (time.perf_counter() - started)
    kinds = ", ".join(f"{count} {how}" for how, count in sorted(stored.items()))
    say(f"{final}: {content.samples} samples of {len(content.classes)} classes, "
          f"{format_bytes(content.bytes)}, {speed:.0f} images/s: {kinds}")  # fmt: skip
    for line in content.remarks:
        say(f"{final}: {line}; its sidecar lists them")


def _write(
    partial: Path, split: _Split, encoder: Encoder, options: ConvertOptions
) -> tuple[dict[int, str], dict[str, int], dict[str, list[str]]]:
    """Write the file.

    Return what is wrong with each image left out, counts by way of storage, and the images that were
    encoded anew by the reason for it.
    """
    source = split.source
    skipped: dict[int, str] = {}
    anew: dict[str, list[str]] = {}
    stored: Counter[str] = Counter()
    encoding = contextlib.closing(_encode(split, split.chosen, encoder, options.workers))
    progress = ProgressBar(split.name, len(split.chosen))
    with partial.open("wb") as file, encoding as results, progress:
        writer = BetonWriter(file, len(split.chosen))
        for done, (index, encoded) in enumerate(zip(split.chosen.tolist(), results, strict=True)):
            if isinstance(encoded, DataError):
                place = source.locate(index)
                # The disk or network of all may be gone.
                if source.has_files and not os.path.lexists(place):
                    raise cannot_read(place, "it was there a moment ago")
                if not options.skip_bad:
                    raise DataError(
                        f"broken image {place}: {encoded}; "
                        "repair it, remove it, or leave it out with --skip-bad"
                    )
                skipped[index] = str(encoded)
            else:
                stored[encoded.how] += 1
                if encoded.why:
                    anew.setdefault(encoded.why, []).append(split.names[index])
                writer.add(encoded.stored, int(source.labels[index]))
            progress.update(done + 1, writer.bytes_written, len(skipped))
        if not stored:
            raise DataError(f"{source.place}: all {len(skipped)} images are broken")
        writer.finish()
        fsync(file.fileno(), partial)
    return skipped, dict(stored), anew


def _read_back(
    partial: Path, split: _Split, skipped: dict[int, str], encoder: Encoder, workers: int
) -> None:
    """Encode a few images again; raise DataError unless the written file has the same samples."""
    beton = open_beton(partial)
    written = np.array([i for i in split.chosen.tolist() if i not in skipped])
    positions = _spread(np.arange(len(written)), PROBES)
    again = _encode(split, written[positions], encoder, workers)
    found = reasons(beton, positions, workers)
    with partial.open("rb", buffering=0) as file:
        for position, encoded, reason in zip(positions, again, found, strict=True):
            if (
                reason is not None
                or isinstance(encoded, DataError)
                or not np.array_equal(
                    stored_bytes(beton, file.fileno(), position), encoded.stored.data
                )
                or beton.labels[position] != split.source.labels[written[position]]
            ):
                raise DataError(
                    f"{partial}: sample {position} does not read back as it was written "
                    f"({reason or 'other bytes'}); is the disk sound?"
                )


def _encode(
    split: _Split, indices: Indices, encoder: Encoder, workers: int
) -> Generator[Encoded | DataError]:
    source = split.source
    source.expect(indices)
    return ordered_map(
        lambda i: encoder(source.locate(i), partial(source.read, i), i),
        indices.tolist(),
        workers,
        source.stop,
    )

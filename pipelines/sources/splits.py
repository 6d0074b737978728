"""Training and validation images, from whatever --data names."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.image_io import folders_in
from pipelines.sources import manifest, remote_shards, shards
from pipelines.sources.cache_options import DEFAULT_CACHE, CacheOptions
from pipelines.sources.folder import ImageFolder, scan_folder, scan_train_val
from pipelines.sources.options import NO_OPTIONS, SplitOptions
from pipelines.sources.patterns import is_pattern
from pipelines.sources.source import Source
from pipelines.utils.errors import UsageError, error_context
from pipelines.utils.location import Location, Url, location
from pipelines.utils.output import note_once, say
from pipelines.utils.text import distinct, first_names

Kind = Literal["folder", "manifest", "shards"]


def open_splits(
    data: str | Path,
    options: SplitOptions = NO_OPTIONS,
    with_train: bool = True,
    prepare: Callable[[Source], Source] = lambda source: source,
    cache: CacheOptions = DEFAULT_CACHE,
) -> tuple[Source | None, Source]:
    """Return the training images, None without `with_train`, and the validation images.

    prepare: is called with each split as it was found, and may leave images out. cache: for shards
    in object storage.

    Raises UsageError if one of them is missing or malformed, or their classes differ.
    """
    with error_context("--data"):
        data = location(data)
    if options.val_fraction is None:
        with error_context("--val-data"):
            val_data = None if options.val_data is None else location(options.val_data)
        train, val = _open_both(data, val_data, with_train, cache)
        return train and prepare(train), prepare(val)
    with error_context("--data"):
        whole = open_split(data, "train", cache)
        if _has_val(data):
            raise UsageError(f"{data} has validation images of its own: leave out --val-fraction")
    train, val = split_by_name(prepare(whole), options.val_fraction)
    return train if with_train else None, val


def _open_both(
    data: Location, val_data: Location | None, with_train: bool, cache: CacheOptions
) -> tuple[Source | None, Source]:
    with error_context("--data"):
        kind = kind_of(data)
    if val_data is None and kind == "folder" and isinstance(data, Path):
        return scan_train_val(data, with_train)
    with error_context("--data"):
        if val_data is None and not _has_val(data):
            if isinstance(data, Url):  # of a mistyped pattern there is nothing at all
                remote_shards.list_remote(data, "train")
            elif kind == "shards":
                shards.list_shards(data, "train")
            raise UsageError(f"{data} has no validation images: add --val-data or --val-fraction")
    with error_context("--data" if val_data in (None, data) else "--val-data"):
        val = open_split(val_data or data, "val", cache)
    # A table has the classes of all its rows.
    if not with_train and (val_data is not None or kind == "manifest"):
        return None, val
    with error_context("--data"):
        train = open_split(data, "train", cache)
        train, val = _with_common_classes(train, val)
    return train if with_train else None, val


def open_each(data: str | Path, cache: CacheOptions = DEFAULT_CACHE) -> list[Source]:
    """Return the splits that `data` has, of train and val, or all of it, if it has none.

    Raises UsageError if there are no images.
    """
    data = location(data)
    if isinstance(data, Url) or kind_of(data) != "folder":
        return [
            open_split(data, "train", cache),
            *([open_split(data, "val", cache)] if _has_val(data) else []),
        ]
    splits = [data / split for split in ("train", "val") if (data / split).is_dir()]
    if splits:
        _note_other_folders(data)
    return [scan_folder(folder) for folder in splits or [data]]


def kind_of(data: Location) -> Kind:
    """Return what kind of source a path or URL is. Raises UsageError if it is none."""
    if isinstance(data, Url):
        return "shards"
    if data.is_dir():
        return "shards" if shards.has_shards(data) else "folder"
    is_table = data.suffix.lower() in manifest.SUFFIXES
    if is_pattern(str(data)) and not (is_table and data.is_file()):
        return "shards"
    if is_table:
        return "manifest"
    if not data.exists():
        raise UsageError(f"there is no folder {data}")
    raise UsageError(
        f"{data} is no folder, no table ({', '.join(manifest.SUFFIXES)}) and no tar shards; "
        "write the images to a folder per class, or a table of their paths"
    )


def split_by_name(source: Source, fraction: float) -> tuple[Source, Source]:
    """Return the training and validation images: those with the smallest hashes of their names.

    An image's side depends on its name and the fraction alone, on any machine and whatever else there is.
    """
    bound = int(fraction * 2**64)
    hashes = [hashlib.sha256(os.fsencode(name)).digest()[:8] for name in source.names]
    is_val = np.array([int.from_bytes(h, "big") < bound for h in hashes], bool)
    nowhere = _lacking(source.classes, source.labels)
    sides = []
    for split, chosen in (("train", ~is_val), ("val", is_val)):
        side = source.subset(np.flatnonzero(chosen).tolist(), split)
        lost = [n for n in _lacking(side.classes, side.labels) if n not in nowhere]
        if (split == "train" and lost) or not len(side):
            raise UsageError(
                f"--val-fraction {fraction:g}: leaves {split} without {first_names(lost)}"
            )
        sides.append(side)
    return sides[0], sides[1]


def announce(train: Source | None, val: Source | None = None) -> None:
    """Print what was found in both splits, and warn of what is hardly meant."""
    for source in (train, val):
        if source is not None:
            announce_one(source)
    warn_of_both(train, val)


def announce_one(source: Source) -> None:
    """Print what was found in a source, and warn of a single class."""
    say(f"{source.place}: {source.counted}")
    if len(source.classes) == 1:
        below: list[str] = []
        if isinstance(source, ImageFolder):
            inside = (name.split("/")[1:] for name in source.names)
            below = sorted({name[0] for name in inside if len(name) > 1})
        warn_of_single_class(source.place, source.classes[0], below)


def warn_of_lost_weights(source: Source) -> None:
    """Warn that a table's weights do not come along where its images are written to."""
    if source.weights is not None:
        say(
            f"warning: {source.place}: the column weight is not written: training on the output weights "
            "all images equally",
            sys.stderr,
        )


def warn_of_both(train: Source | None, val: Source | None) -> None:
    """Warn of the classes, of either split, that one of the splits has no images of, and of common paths."""
    sources = [source for source in (train, val) if source is not None]
    classes = list(dict.fromkeys(name for source in sources for name in source.classes))
    for source in sources:
        known = source if source.classes == classes else source.with_classes(classes)
        warn_of_lacking(source.place, classes, known.labels, is_train=source is train)
    if isinstance(train, manifest.Manifest) and isinstance(val, manifest.Manifest):
        common = manifest.common_paths(train, val)
        if common:
            say(
                f"warning: {len(common)} images of {val.place} are also training images "
                f"({first_names(common)})",
                sys.stderr,
            )


def warn_of_lacking(
    place: str | Path, classes: Sequence[str], labels: NDArray[np.int64], is_train: bool
) -> None:
    """Warn of the classes that the labels of a split have not."""
    names = _lacking(classes, labels)
    if not names:
        return
    what = f"{place} has no images of {len(names)} of {len(classes)} classes ({first_names(names)})"
    if is_train:
        say(f"warning: {what}: the network cannot learn them", sys.stderr)
    else:
        say(f"note: {what}: its accuracies do not cover them", sys.stderr)


def _lacking(classes: Sequence[str], labels: NDArray[np.int64]) -> list[str]:
    present = np.zeros(len(classes), bool)
    present[labels] = True  # np.unique would take 1 s of 14 million
    return [classes[i] for i in np.flatnonzero(~present).tolist()]


def warn_of_single_class(place: str | Path, name: str, below: Sequence[str] = ()) -> None:
    """Warn that there is nothing to tell apart; `below`: folders in it, which may be the classes."""
    text = f"warning: {place} has a single class, {name}"
    if below:
        text += f", with the folders {first_names(below)}; expected {place}/CLASS/IMAGE"
    say(text, sys.stderr)


def open_split(data: str | Path, split: str, cache: CacheOptions = DEFAULT_CACHE) -> Source:
    """Return one split; of a folder or table that has no splits, all of it."""
    data = location(data)
    if isinstance(data, Url):
        return remote_shards.open_remote(data, split, cache)
    kind = kind_of(data)
    if kind == "manifest":
        return manifest.read(data, split)
    if kind == "shards":
        return shards.open_shards(data, split)
    if (data / split).is_dir():
        _note_other_folders(data)
        return scan_folder(data / split)
    if split == "train" and (data / "val").is_dir():
        raise UsageError(f"{data} has no folder 'train'")
    return dataclasses.replace(scan_folder(data), split=split)


def _note_other_folders(data: Path) -> None:
    """Say which folders beside train, or val, are not used if it is there alone: it may be a class."""
    found = folders_in(data)
    if {"train", "val"} <= {*found}:
        return
    split = "train" if "train" in found else "val"
    others = [
        distinct(n) for n in found if n not in (split, "test") and not n.startswith((".", "@"))
    ]
    if others:
        note_once(
            str(data),
            f"{data}/{split} is taken for the images of {split}; not used are {first_names(others)}",
        )


def _has_val(data: Location) -> bool:
    if isinstance(data, Url):
        return remote_shards.has_remote_split(data, "val")
    kind = kind_of(data)
    if kind == "manifest":
        return manifest.has_split(data, "val")
    if kind == "shards":
        return shards.has_split(data, "val")
    return "val" in folders_in(data)


def _with_common_classes(train: Source, val: Source) -> tuple[Source, Source]:
    """Return both with the classes of the training images; the validation images may lack some."""
    if train.classes == val.classes:
        return train, val
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        names = first_names([distinct(name) for name in unknown])
        raise UsageError(
            f"the classes of {train.place} and {val.place} differ: only in val: {names}"
        )
    return train, val.with_classes(train.classes)

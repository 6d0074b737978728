"""The report of `verify`, verified.json: which images are bad, and for which state of the folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.sources.patterns import has_splits, is_pattern
from pipelines.sources.source import Source
from pipelines.utils.atomic_io import atomic_write_json
from pipelines.utils.errors import DataError, UsageError, error_context, first_line
from pipelines.utils.output import say
from pipelines.utils.reading import Stamp, reading

VERSION = 2  # 1 knew neither `faulty` nor `max_megapixels`, and had no hash


@dataclass(frozen=True)
class SplitReport:
    """The result for one split."""

    fingerprint: str
    images: int
    bad: dict[str, str]
    """Name, in a folder the path below the split's, and what is wrong with the image."""

    faulty: dict[str, str] | None = None
    """The same of images that decode, but with errors; None if that was not looked for."""

    max_megapixels: float | None = None
    """The limit by which larger images are bad."""


def key(source: Source, is_named: bool) -> str:
    """Return the name of a source in its report: its split, or the pattern of shards that has no splits.

    The shards of several patterns lie in one folder, and have one report. is_named: whether --report names
    it, which may be one for several data sets.
    """
    if is_named:
        return f"{source.split} of {source.data}"
    pattern, is_folder = str(source.data), isinstance(source.data, Path) and source.data.is_dir()
    if source.shard is None or is_folder or not is_pattern(pattern) or has_splits(pattern):
        return source.split
    return source.data.name


def fingerprint(stamps: dict[str, Stamp]) -> str:
    """Return the SHA-256 of the names, sizes and times, in their order."""
    digest = hashlib.sha256()
    for name, stamp in stamps.items():
        digest.update(os.fsencode(f"{name}\0{stamp}\n"))
    return digest.hexdigest()


def write(report: Path, splits: dict[str, SplitReport]) -> None:
    """Write the report atomically. Raises OSError."""
    content = {split: dataclasses.asdict(found) for split, found in splits.items()}
    atomic_write_json(report, {"version": VERSION, "sha256": _sha256(content), "splits": content})


def _sha256(splits: Any) -> str:
    """Return the hash of a report's content, which decides what is trained on."""
    return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()


def read(report: Path) -> dict[str, SplitReport]:
    """Return the results by split, empty if there is no such file. Raises UsageError if it is no report."""
    try:
        with reading(report):
            text = report.read_text()
        content = json.loads(text)
        if content["version"] not in (1, VERSION):
            raise ValueError(f"version {content['version']}, not {VERSION}")
        if content["version"] > 1 and content["sha256"] != _sha256(content["splits"]):
            raise ValueError("it was changed since it was written")
        return {split: _parse_split(**found) for split, found in content["splits"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{report} is no report of a verification ({type(error).__name__}: {first_line(error)}); "
            "remove it to have the images verified anew"
        ) from None


def skip_bad(
    source: Source, report: Path | None, strict: bool = False, verbose: bool = False
) -> Source:
    """Return the split without the images that `verify` found bad.

    strict: nor those that decode with errors. verbose: print how many.

    Raises UsageError if there is no report or it is of another state of the images, DataError if
    all images of a class are bad.
    """
    path = report or source.report
    with error_context("--skip-bad"):
        splits = read(path)
    command = source.verify_command(report)
    if not splits:
        raise UsageError(f"--skip-bad: there is no report {path}; {command} writes it")
    state = fingerprint(source.stamps())
    own = splits.get(key(source, report is not None))
    # Else any entry with this fingerprint: another command may use the same images as its other split.
    known = (one for one in (own, *splits.values()) if one and one.fingerprint == state)
    found = next(known, None)
    if found is None:
        raise UsageError(
            f"--skip-bad: {path} is of another state of {source.place}; {command} writes it anew"
        )
    if strict and found.faulty is None:
        raise UsageError(
            f"--strict: {path} does not say which images decode with errors; {command} writes it anew"
        )
    names = found.bad | (found.faulty or {} if strict else {})
    left = without(source, names)
    require_every_class(source, left)
    if verbose:
        say(
            f"--skip-bad: left out {len(names)} of {found.images} images of {source.split}, "
            f"which {path} lists"
        )
    return left


def without(source: Source, names: Container[str]) -> Source:
    """Return the source without the images of these names, but with all its classes."""
    return source.subset([i for i, name in enumerate(source.names) if name not in names])


def require_every_class(source: Source, left: Source) -> None:
    """Raise DataError if a class of a source has none of its images in `left`, a part of it."""
    before, after = (np.bincount(one.labels, minlength=len(one.classes)) for one in (source, left))
    lost = np.flatnonzero((before > 0) & (after == 0))
    if len(lost):
        raise DataError(
            f"all images of {source.place}/{source.classes[lost[0]]} are bad; "
            "put good ones there, or remove the class from train and val"
        )


def _parse_split(
    fingerprint: Any, images: Any, bad: Any, faulty: Any = None, max_megapixels: Any = None
) -> SplitReport:
    """Return one split's result. Raises TypeError if the fields are not of its types."""
    if not (
        isinstance(fingerprint, str)
        and isinstance(images, int)
        and _are_reasons(bad)
        and (faulty is None or _are_reasons(faulty))
        and isinstance(max_megapixels, float | None)
    ):
        raise TypeError("a field is of another type")
    return SplitReport(fingerprint, images, bad, faulty, max_megapixels)


def _are_reasons(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(reason, str) for reason in value.values())

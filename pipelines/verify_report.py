"""What a verification leaves behind: which images are bad, and for which state of the folder that holds."""

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

from pipelines.image_folder import ImageFolder, verify_command
from pipelines.utils.atomic_io import atomic_write_json
from pipelines.utils.errors import DataError, UsageError, error_context, first_line

REPORT = "verified.json"  # in the folder that has train and val
VERSION = 1

# Size in bytes and time of the last change in ns; None of what is no file, as a dangling link.
Stamp = tuple[int, int] | None


@dataclass(frozen=True)
class Verified:
    """What was found in one split."""

    fingerprint: str
    images: int
    bad: dict[str, str]
    """Path below the split's folder, and what is wrong with the image."""


def stamps(folder: ImageFolder) -> dict[str, Stamp]:
    """By the path below the folder's root, in the folder's order. 5 s for a million images."""
    return {name: _stamp(path) for name, path in zip(folder.names, folder.paths, strict=True)}


def fingerprint(stamps: dict[str, Stamp]) -> str:
    """SHA-256 of the names, sizes and times, in their order."""
    digest = hashlib.sha256()
    for name, stamp in stamps.items():
        digest.update(os.fsencode(f"{name}\0{stamp}\n"))
    return digest.hexdigest()


def write(report: Path, splits: dict[str, Verified]) -> None:
    """All at once, or not at all."""
    content = {split: dataclasses.asdict(found) for split, found in splits.items()}
    atomic_write_json(report, {"version": VERSION, "splits": content})


def read(report: Path) -> dict[str, Verified]:
    """By split; empty if there is no such file. Raises UsageError if it is something else."""
    try:
        content = json.loads(report.read_text())
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, not {VERSION}")
        return {split: _verified(**found) for split, found in content["splits"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{report} is no report of a verification ({type(error).__name__}: {first_line(error)}); "
            "remove it to have the images verified anew"
        ) from None


def skip_bad(
    train: ImageFolder | None, val: ImageFolder, report: Path | None, say: bool
) -> tuple[ImageFolder | None, ImageFolder]:
    """The folders without the images that the verification found bad; `say`: print how many.

    Raises UsageError if there is no report or it is of another state of the folders, DataError if
    nothing is left of a class.
    """
    data = val.root.parent
    path = report or data / REPORT
    with error_context("--skip-bad"):
        splits = read(path)
    command = verify_command(data, report)
    if not splits:
        raise UsageError(f"--skip-bad: there is no report {path}; {command} writes it")
    counts: list[str] = []

    def without_bad(folder: ImageFolder) -> ImageFolder:
        found = splits.get(folder.root.name)
        if found is None or found.fingerprint != fingerprint(stamps(folder)):
            raise UsageError(
                f"--skip-bad: {path} is of another state of {folder.root}; {command} writes it anew"
            )
        left = without(folder, found.bad)
        require_every_class(left)
        counts.append(f"{len(found.bad)} of {found.images} images of {folder.root.name}")
        return left

    result = (None if train is None else without_bad(train)), without_bad(val)
    if say:
        print(f"--skip-bad: left out {' and '.join(counts)}, which {path} lists")
    return result


def without(folder: ImageFolder, names: Container[str]) -> ImageFolder:
    """The folder without the images of these paths below its root; it keeps all its classes."""
    kept = [i for i, name in enumerate(folder.names) if name not in names]
    paths = [folder.paths[i] for i in kept]
    return ImageFolder(folder.root, folder.classes, paths, folder.labels[kept])


def require_every_class(folder: ImageFolder) -> None:
    """Raise DataError if nothing is left of a class."""
    counts = np.bincount(folder.labels, minlength=len(folder.classes))
    if not counts.all():
        name = folder.classes[int(counts.argmin())]
        raise DataError(
            f"all images of {folder.root / name} are bad; "
            "put good ones there, or remove the class from train and val"
        )


def _verified(fingerprint: Any, images: Any, bad: Any) -> Verified:
    """Raises TypeError if the fields are not of these types."""
    if not (
        isinstance(fingerprint, str)
        and isinstance(images, int)
        and isinstance(bad, dict)
        and all(isinstance(reason, str) for reason in bad.values())
    ):
        raise TypeError("a field is of another type")
    return Verified(fingerprint, images, bad)


def _stamp(path: str) -> Stamp:
    try:
        state = os.stat(path)  # noqa: PTH116 - pathlib is slow on a million files
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns

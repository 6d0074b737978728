"""What stands beside FILE.beton in FILE.beton.json: where it is from, and how to tell that it is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.files import write_json

VERSION = 1


@dataclass(frozen=True)
class Sidecar:
    samples: int
    classes: list[str]
    settings: dict[str, Any]
    """The converter's options that the samples depend on."""

    bytes: int
    sha256: str
    source: dict[str, Any]
    """Images of the source folder, and the SHA-256 of their names and sizes."""

    stored: dict[str, int]
    """Samples by the way they were stored."""

    skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)
    """Images that were left out, with the reason."""

    version: int = VERSION


def path_of(beton: Path) -> Path:
    return beton.with_name(beton.name + ".json")


def write(path: Path, sidecar: Sidecar) -> None:
    write_json(path, dataclasses.asdict(sidecar))


def read(beton: Path) -> Sidecar | None:
    """The sidecar of `beton`, None if there is none. Raises DataError if it is of no use."""
    path = path_of(beton)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise DataError(
                f"{path}: written by version {content['version']} of the converter, this is version "
                f"{VERSION}; convert the data anew with python -m pipelines.beton"
            )
        found = Sidecar(**content)
        _check_types(found)
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove it to have {beton.name} "
            "checked sample by sample instead"
        ) from None


def _check_types(sidecar: Sidecar) -> None:
    for field in dataclasses.fields(sidecar):
        kind = str(field.type).partition("[")[0]
        if type(getattr(sidecar, field.name)).__name__ != kind:
            raise TypeError(f"{field.name} is no {kind}")
    if not all(isinstance(name, str) for name in sidecar.classes):
        raise TypeError("classes are no strings")


def check(sidecar: Sidecar, beton: Path, samples: int) -> None:
    """Raise DataError unless `beton` has the size and the number of samples that its sidecar says."""
    size = beton.stat().st_size
    if (size, samples) != (sidecar.bytes, sidecar.samples):
        raise DataError(
            f"{beton} has {size} bytes and {samples} samples, its sidecar says {sidecar.bytes} and "
            f"{sidecar.samples}; convert the data anew with python -m pipelines.beton"
        )


def fingerprint(root: Path, paths: Sequence[str]) -> tuple[str, int]:
    """SHA-256 of the names below `root` and sizes of the files, and the sum of the sizes."""
    digest, total = hashlib.sha256(), 0
    for path in paths:
        size = size_of(path)
        digest.update(f"{os.path.relpath(path, root)}\0{size}\n".encode(errors="surrogateescape"))
        total += size
    return digest.hexdigest(), total


def size_of(path: str) -> int:
    """Bytes of a file; 0 if it cannot be found, as a dangling link: its reader will say so."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - pathlib is slow on a million files
    except OSError:
        return 0


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

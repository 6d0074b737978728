"""FILE.beton.json, beside a .beton file: its classes, where it came from and what it should contain."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.ffcv.beton import Beton, table_sha256
from pipelines.image_formats import DECODES_WITH_ERRORS
from pipelines.utils.atomic_io import atomic_write_json
from pipelines.utils.errors import DataError
from pipelines.utils.reading import reading
from pipelines.utils.schema import (
    OBJECT,
    TEXT,
    dict_of,
    integer,
    list_of,
    parsing,
    require_fields,
)
from pipelines.utils.text import first_names

SIDECAR_VERSION = 1


@dataclass(frozen=True)
class Sidecar:
    """The content of FILE.beton.json."""

    samples: int
    classes: list[str]
    settings: dict[str, Any]
    """The converter's options that the samples depend on."""

    bytes: int
    sha256: str
    source: dict[str, Any]
    """Number of images in the source folder, and the SHA-256 of their names and sizes."""

    stored: dict[str, int]
    """Number of samples by the way they were stored: copied, encoded, raw."""

    skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)
    """Images that were left out, with the reason."""

    encoded: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Images whose own bytes the file has not, by the reason: their format, or the decoder's words."""

    table_sha256: str = ""
    """Of the file's labels, sizes and positions, see `beton.table_sha256`; "" of earlier versions."""

    version: int = SIDECAR_VERSION

    @property
    def faulty(self) -> list[str]:
        """The images that decode with errors."""
        parts = (
            images for why, images in self.encoded.items() if why.startswith(DECODES_WITH_ERRORS)
        )
        return [image for images in parts for image in images]

    @property
    def remarks(self) -> list[str]:
        """What is to be known of the images that were left out or encoded anew, as text."""
        faulty = {DECODES_WITH_ERRORS: self.faulty} if self.faulty else {}
        formats = {k: v for k, v in self.encoded.items() if not k.startswith(DECODES_WITH_ERRORS)}
        return ([self.lacks] if self.skipped else []) + [
            f"decoded and stored anew: {len(images)} ({why}: {first_names(images)})"
            for why, images in (faulty | formats).items()
        ]

    @property
    def lacks(self) -> str:
        """How many of the source's images the file lacks, as text."""
        images = self.samples + len(self.skipped)
        return f"lacks {len(self.skipped)} of {images} images, which were broken and left out"


_RULES = {
    "samples": integer(1),
    "classes": list_of("a list of names", TEXT),
    "settings": OBJECT,
    "bytes": integer(1),
    "sha256": TEXT,
    "source": OBJECT,
    "stored": dict_of("numbers by name", integer(0)),
    "skipped": list_of("a list of objects with texts", dict_of("texts by name", TEXT)),
    "encoded": dict_of("lists of names, by reason", list_of("a list of names", TEXT)),
    "table_sha256": TEXT,
}


def sidecar_path(beton: Path) -> Path:
    """Return the path of a .beton file's sidecar."""
    return beton.with_name(beton.name + ".json")


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Write the sidecar atomically. Raises OSError."""
    atomic_write_json(path, dataclasses.asdict(sidecar))


def read_sidecar(beton: Path) -> Sidecar | None:
    """Return the sidecar of a .beton file, None if there is none. Raises DataError if it is damaged."""
    path = sidecar_path(beton)
    if not path.exists():
        return None
    with parsing(path, f"remove it to have {beton.name} checked sample by sample instead"):
        with reading(path):
            data = path.read_bytes()
        content = json.loads(data)
        if content["version"] != SIDECAR_VERSION:
            raise DataError(
                f"{path}: written by version {content['version']} of the converter, this is version "
                f"{SIDECAR_VERSION}; convert the data anew with rsnet convert"
            )
        found = Sidecar(**content)
        require_fields(dataclasses.asdict(found), _RULES)
        return found


def check_sidecar(sidecar: Sidecar, beton: Beton) -> None:
    """Raise DataError unless `beton` has the size, the number of samples and the table of its sidecar."""
    size, advice = beton.path.stat().st_size, "convert the data anew with rsnet convert"
    if (size, len(beton)) != (sidecar.bytes, sidecar.samples):
        raise DataError(
            f"{beton.path} has {size} bytes and {len(beton)} samples, its sidecar says {sidecar.bytes} "
            f"and {sidecar.samples}; {advice}"
        )
    if sidecar.table_sha256 and sidecar.table_sha256 != table_sha256(beton.path):
        raise DataError(
            f"{beton.path}: labels or positions are not those that its sidecar has the SHA-256 of; {advice}"
        )

"""Tables of a study's images: so many of each class to train on, chosen by their names."""

from __future__ import annotations

import csv
import hashlib
import os
from pathlib import Path

from pipelines.sources.folder import ImageFolder, scan_train_val
from pipelines.utils.errors import UsageError

HELD_OUT = 0.1  # of the training images, on which the learning rate is chosen

# Path, label, split.
_Rows = list[tuple[str, str, str]]


def write_tables(data: Path, folder: Path, per_class: int | None) -> tuple[Path, Path]:
    """Write the table of the study and that of the choice of its learning rate to `folder`; return both.

    The first has `per_class` training images of each class (None: all) and all of val; the second the same
    training images, a tenth of which are its val. The images are the same on every machine.

    Raises UsageError if `data` is no folder of train and val, or a class has too few images.
    """
    train, val = scan_train_val(data)
    assert train is not None
    study: _Rows = []
    choice: _Rows = []
    for label, names in _by_class(train).items():
        if per_class is not None and len(names) < per_class:
            raise UsageError(f"--per-class {per_class}: {label} has {len(names)} training images")
        # A hash, so that neither the order of the names nor their number matters.
        chosen = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())[
            :per_class
        ]
        held_out = round(HELD_OUT * len(chosen))
        study += [(f"train/{name}", label, "train") for name in chosen]
        choice += [(f"train/{name}", label, "train") for name in chosen[held_out:]]
        choice += [(f"train/{name}", label, "val") for name in chosen[:held_out]]
    study += [
        (f"val/{name}", label, "val") for label, names in _by_class(val).items() for name in names
    ]
    return _write(folder / "study.csv", data, study), _write(folder / "lr.csv", data, choice)


def _by_class(source: ImageFolder) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: [] for name in source.classes}
    for name, label in zip(source.names, source.labels.tolist(), strict=True):
        found[source.classes[label]].append(name)
    return found


def _write(path: Path, data: Path, rows: _Rows) -> Path:
    below = os.path.relpath(data, path.parent)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("path", "label", "split"))
        table.writerows((f"{below}/{name}", label, split) for name, label, split in sorted(rows))
    return path

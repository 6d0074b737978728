"""Incomplete .beton files, and those that do not fit their sidecars, are refused before training starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipelines.utils.errors import DataError, UsageError
from tests.conftest import needs_ffcv
from tests.helpers.betons import loaders_of, table_of

pytestmark = needs_ffcv


def _missing_file(beton):
    (beton / "val.beton").unlink()
    return f"there is no file {beton}/val.beton"


def _another_version(beton):
    _edit(beton / "val.beton.json", version=99)
    return "val.beton.json: written by version 99 of the converter, this is version 1; convert"


def _damaged_sidecar(beton):
    (beton / "val.beton.json").write_text('{"version": 1, "sam')
    return "val.beton.json is damaged"


def _sidecar_without_a_field(beton):
    content = json.loads((beton / "val.beton.json").read_text())
    del content["classes"]
    (beton / "val.beton.json").write_text(json.dumps(content))
    return "val.beton.json is damaged .TypeError.*classes"


def _wrong_types(beton):
    _edit(beton / "val.beton.json", samples="17")
    return "val.beton.json is damaged .samples is '17', must be an integer"


def _numbered_classes(beton):
    _edit(beton / "val.beton.json", classes=[0, 1, 2])
    return "val.beton.json is damaged .classes is .0, 1, 2., must be a list of names"


def _endless_nesting(beton):
    (beton / "val.beton.json").write_text("[" * 200_000)
    return "val.beton.json is damaged"


def _folder_for_a_sidecar(beton):
    (beton / "val.beton.json").unlink()
    (beton / "val.beton.json").mkdir()
    return "val.beton.json: Is a directory"


def _other_size(beton):
    _edit(beton / "val.beton.json", bytes=5)
    return "val.beton has [0-9]+ bytes and 17 samples, its sidecar says 5 and 17"


def _other_classes(beton):
    _edit(beton / "val.beton.json", classes=["ant", "bee", "dog"])
    return "classes of .*train.beton and .*val.beton differ: cat, dog"


def _classes_in_another_order(beton):
    _edit(beton / "val.beton.json", classes=["bee", "ant", "cat"])
    return "classes of .*train.beton and .*val.beton differ in their order"


def _too_few_classes(beton):
    for split in ("train", "val"):
        _edit(beton / f"{split}.beton.json", classes=["ant", "bee"])
    return "there is a label 2, but 2 classes"


def _cut_off(beton):
    os.truncate(beton / "val.beton", (beton / "val.beton").stat().st_size - 1000)
    return "val.beton: it is cut off"


def _half_written(beton):
    with (beton / "val.beton").open("r+b") as file:
        file.seek(16)
        file.write(bytes(8))  # the allocation table's place, which is written last
    return "val.beton: it was not written to its end"


def _something_else(beton):
    (beton / "val.beton").write_bytes(b"PK" * 5000)
    return "val.beton: it is no FFCV file"


def _empty(beton):
    (beton / "val.beton").write_bytes(b"")
    return "val.beton: it has 0 bytes only"


def _zeroed_table(beton):
    path = beton / "val.beton"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 24)
        file.write(bytes(24))
    return "its samples and its allocation table do not agree"


def _impossible_picture(beton):
    image = table_of(beton / "val.beton")[table_of(beton / "val.beton").dtype.names[0]]
    image["height"][3] = image["width"][3] = 65000
    return "sample 3 has an impossible shape"


def _edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "damage",
    [
        _missing_file, _another_version, _damaged_sidecar, _sidecar_without_a_field, _wrong_types,
        _numbered_classes, _endless_nesting, _folder_for_a_sidecar, _other_size, _other_classes,
        _classes_in_another_order, _too_few_classes, _cut_off, _half_written, _something_else,
        _empty, _zeroed_table, _impossible_picture,
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_before_training(beton, damage):
    message = damage(beton)
    with pytest.raises((UsageError, DataError), match=message):
        loaders_of(beton)


@pytest.mark.parametrize(
    ("type_id", "name"), [(0, "FloatField"), (255, "a type of its own"), (77, "a type of its own")]
)
def test_a_field_of_another_type_is_named_with_its_type(beton, type_id, name):
    """By the descriptors of the format: type (1 byte), name (16), arguments (1024)."""
    path = beton / "val.beton"
    data = bytearray(path.read_bytes())
    place = data.index(b"label\0") - 1
    data[place] = type_id
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        loaders_of(beton)
    fields = f"image (RGBImageField), label ({name})"
    assert (
        f": its fields are {fields} instead of image (RGBImageField) and label (IntField); "
        in str(error.value)
    )


def test_a_label_that_no_data_set_has_is_refused(beton):
    for split in ("train", "val"):
        (beton / f"{split}.beton.json").unlink()
    table_of(beton / "val.beton")["f1"][5] = 1 << 40
    with pytest.raises(DataError, match="sample 5 has an impossible shape or label"):
        loaders_of(beton, trust=True)

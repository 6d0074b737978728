"""What decides the labels of a .beton file: its tables, which the sidecar has the SHA-256 of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.utils.errors import DataError
from tests.conftest import needs_ffcv
from tests.helpers.betons import edit_sidecar, import_ffcv, table_of
from tests.helpers.fuzzing import accepts_or_refuses, altered, damaged, efforts

pytestmark = needs_ffcv


def _open(path: Path) -> None:
    """What a training does with a file before it decodes the first sample."""
    from pipelines.ffcv.beton import open_beton
    from pipelines.ffcv.sidecar import check_sidecar, read_sidecar

    opened, sidecar = open_beton(path), read_sidecar(path)
    if sidecar is not None:
        check_sidecar(sidecar, opened)


@pytest.mark.parametrize("position", ["label", "order"])
def test_labels_that_were_changed_are_noticed(beton, position):
    path = beton / "val.beton"
    _open(path)

    samples = table_of(path)
    image, label = samples.dtype.names
    if position == "label":
        samples[label][0] = 1 - samples[label][0]
    else:
        samples[image][[0, -1]] = samples[image][[-1, 0]]
    samples.flush()
    with pytest.raises(DataError, match="labels or positions are not those"):
        _open(path)


def test_a_sidecar_of_an_earlier_version_has_no_hash_of_the_tables(beton):
    path = beton / "val.beton"
    edit_sidecar(path, lambda content: content.pop("table_sha256"))
    _open(path)


@pytest.mark.parametrize("pointer", [2**64 - 1, 2**63, 2**40])
def test_a_position_behind_the_end_is_noticed_also_where_its_sum_with_the_size_wraps(
    beton, pointer
):
    import_ffcv()
    from ffcv.types import ALLOC_TABLE_TYPE, HeaderType

    path = beton / "val.beton"
    samples = table_of(path)
    samples[samples.dtype.names[0]]["data_ptr"][0] = pointer
    samples.flush()
    header = np.fromfile(path, HeaderType, count=1)[0]
    with path.open("r+b") as file:
        file.seek(int(header["alloc_table_ptr"]))
        table = np.frombuffer(file.read(), ALLOC_TABLE_TYPE).copy()
        table["ptr"][0], table["size"][0] = pointer, 100
        file.seek(int(header["alloc_table_ptr"]))
        file.write(table.tobytes())
    with pytest.raises(DataError, match="samples and its allocation table do not agree"):
        _open(path)


@efforts
def test_a_sidecar_is_read_or_refused_whatever_its_fields_hold(beton, effort):
    path = beton / "val.beton.json"
    content = json.loads(path.read_text())

    @effort
    @given(altered(lambda: content))
    def check(changed) -> None:
        path.write_text(json.dumps(changed))
        accepts_or_refuses(lambda: _open(beton / "val.beton"))

    check()


@efforts
@pytest.mark.parametrize("part", ["head", "tail"])
def test_a_file_is_opened_or_refused_whatever_bytes_are_in_its_tables(beton, effort, part):
    path = beton / "val.beton"
    sound = path.read_bytes()
    cut = 700 if part == "head" else len(sound) - 300
    first, last = sound[:cut], sound[cut:]

    @effort
    @given(damaged(first if part == "head" else last), st.booleans())
    def check(changed: bytes, keeps_length: bool) -> None:
        if keeps_length and part == "head":
            changed = changed[:cut].ljust(cut, b"\0")
        path.write_bytes(changed + last if part == "head" else first + changed)
        accepts_or_refuses(lambda: _open(path))

    check()

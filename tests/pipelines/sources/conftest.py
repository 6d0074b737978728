"""The same photos as every kind of source."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import csv

from pipelines.sources import remote_reader
from pipelines.sources.shards_options import ShardsOptions, write_shards

if TYPE_CHECKING:  # its libraries are not there where the tests for a GPU run
    from tests.helpers.s3_server import S3Server


def rows_of(folder: Path, below: Path) -> list[dict[str, str]]:
    """The images of an image folder as rows, with paths relative to `below`."""
    return [
        {
            "path": str(path.relative_to(below)),
            "label": path.parent.name,
            "split": path.parent.parent.name,
        }
        for path in sorted(folder.rglob("*.JPEG"))
    ]


def write_table(file: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    if file.suffix == ".parquet":
        pq.write_table(table, file)
    elif file.suffix == ".csv":
        csv.write_csv(table, file)
    else:
        import json

        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def contents(source) -> list[bytes]:
    """The images of a source, as a training reads them."""
    source.expect(np.arange(len(source)))
    try:
        return [source.read(i) for i in range(len(source))]
    finally:
        source.stop()


@functools.cache
def source_of(kind: str, folder: Path) -> Path:
    """The --data of the images of a folder as another kind of source, beside it."""
    if kind == "folder":
        return folder
    if kind == "shards":
        output = folder.with_name(folder.name + "_shards")
        write_shards(ShardsOptions(folder, output, shard_size="100KB"))
        return output
    return write_table(folder.with_suffix(f".{kind}"), rows_of(folder, folder.parent))


def upload(server: S3Server, folder: Path, below: str = "shards") -> str:
    """The files of a folder as objects; returns their URL. Also what `rsnet shards` notes, but no lock."""
    for path in folder.iterdir():
        server.put(f"{below}/{path.name}", path.read_bytes())
    return f"s3://bucket/{below}"


def many_shards(folder: Path) -> Path:
    """13 shards for training and 2 for validation, of small images; a process reads less than one ahead."""
    rng = np.random.default_rng(0)
    for i in range(420):
        path = folder / "images" / ("val" if i < 60 else "train") / f"c{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(path)
    write_shards(ShardsOptions(str(folder / "images"), folder / "shards", shard_size="120KB"))
    return folder / "shards"


@pytest.fixture
def as_kind(request, tmp_path, monkeypatch) -> Callable[[str, Path], str | Path]:
    """`source_of`, and for the kind s3 the shards in a bucket of a server on localhost."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(kind: str, folder: Path) -> str | Path:
        if kind != "s3":
            return source_of(kind, folder)
        return upload(request.getfixturevalue("s3"), source_of("shards", folder))

    return make


@pytest.fixture(params=["csv", "jsonl", "parquet", "shards", "s3"])
def data(request, photos, as_kind) -> str | Path:
    return as_kind(request.param, photos)


@pytest.fixture
def short_waits(monkeypatch) -> None:
    """A look at what other processes of a machine do comes soon, but after threads have had a turn."""
    monkeypatch.setattr(remote_reader, "POLL", 0.002)
    monkeypatch.setattr(remote_reader, "PIN_EVERY", 0.2)

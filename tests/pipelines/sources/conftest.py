"""The same photos as every kind of source."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from pipelines.sources.shards_options import ShardsOptions, write_shards


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


@pytest.fixture(params=["csv", "jsonl", "parquet", "shards"])
def data(request, photos) -> Path:
    return source_of(request.param, photos)

"""What the tests of the FFCV pipeline share: making, opening and damaging .beton files."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from pipelines.batch import Loaders, LoaderSpec
from pipelines.ffcv import ConvertOptions, FfcvOptions, make_loaders

SIZES = (64, 48, 32)


def spec_of(data: Path, **more) -> LoaderSpec:
    defaults = {"batch_size": 3, "normalize": "unit", "device": torch.device("cpu")}
    return LoaderSpec(data, SIZES, **(defaults | more))


_OPENED: list[Loaders] = []


def make(spec: LoaderSpec, **options) -> Loaders:
    _OPENED.append(make_loaders(FfcvOptions(workers=2, **options), spec))
    return _OPENED[-1]


def close_all() -> None:
    while _OPENED:
        for loader in _OPENED.pop()[:2]:
            loader.close()


def loaders_of(data: Path, **options) -> Loaders:
    return make(spec_of(data), **options)


def convert_to(folder: Path, output: Path, **options) -> Path:
    from pipelines.ffcv.convert import convert

    convert(ConvertOptions(workers=2, **options), folder, output)
    return output


def damage_sample(beton: Path, index: int, split: str = "val") -> None:
    """Overwrite the middle of one sample of a split's file."""
    from pipelines.ffcv.beton import open_beton

    samples = open_beton(beton / f"{split}.beton").samples
    with (beton / f"{split}.beton").open("r+b") as file:
        file.seek(int(samples.pointer[index]) + 100)
        file.write(bytes(int(samples.size[index]) - 100))


def table_of(path: Path) -> np.memmap:
    """The file's table of contents, to be changed in place."""
    from pipelines.ffcv.layout import DESCRIPTOR, FIELDS, HEADER, row_type

    start = HEADER.itemsize + len(FIELDS) * DESCRIPTOR.itemsize
    return np.memmap(path, row_type(FIELDS), "r+", offset=start, shape=17)


def import_ffcv() -> None:
    """Import FFCV. numba would compile a typed dictionary, which Python alone reads, for six seconds."""
    with mock.patch("numba.typed.Dict", dict):
        importlib.import_module("ffcv")


def reader_of(path: Path) -> Any:
    """FFCV's own reader."""
    import_ffcv()
    from ffcv.reader import Reader

    return Reader(str(path))


def samples_of(path: Path) -> list[tuple[int, np.ndarray, int]]:
    """(mode, stored bytes, label) of each sample, by FFCV's own reader."""
    reader = reader_of(path)
    sizes = dict(zip(reader.alloc_table["ptr"], reader.alloc_table["size"], strict=True))
    data = np.fromfile(path, np.uint8)
    image, label = (reader.metadata[n] for n in reader.metadata.dtype.names)
    return [
        (int(row["mode"]), data[row["data_ptr"] :][: sizes[row["data_ptr"]]], int(y))
        for row, y in zip(image, label, strict=True)
    ]


def pixels_of(path: Path) -> list[np.ndarray]:
    """Each sample decoded, by FFCV's own reader and PIL."""
    metadata = reader_of(path).metadata
    shapes = [(int(r["height"]), int(r["width"]), 3) for r in metadata[metadata.dtype.names[0]]]
    return [
        data.reshape(shape)
        if mode == 1
        else np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        for (mode, data, _), shape in zip(samples_of(path), shapes, strict=True)
    ]


def sidecar_of(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".json").read_text())


def edit_sidecar(path: Path, change: Callable[[dict], object]) -> None:
    """Change the content of a .beton file's sidecar."""
    content = sidecar_of(path)
    change(content)
    path.with_name(path.name + ".json").write_text(json.dumps(content))

"""The demo data set: ten classes of rendered JPEGs that differ in coarse shape and fine texture.

Five shapes are filled with horizontal or vertical stripes. About 24 stripes cross the short side: at 64
pixels they can be counted, at 32 they blur, so that a lower resolution costs accuracy. Each split has one of
each odd kind of file that ImageNet has: a CMYK JPEG, a PNG named .JPEG, a grayscale, a progressive and an
EXIF-rotated JPEG.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.utils.atomic_io import atomic_directory
from pipelines.utils.bounds import require_count
from pipelines.utils.cli import command
from pipelines.utils.errors import UsageError

Mask = NDArray[np.bool_]
Plane = NDArray[np.float64]

EXIF_ORIENTATION = 0x0112
ROTATE_90 = 6


def _disc(x: Plane, y: Plane) -> Mask:
    return x**2 + y**2 < 1


def _ring(x: Plane, y: Plane) -> Mask:
    return (x**2 + y**2 < 1) & (x**2 + y**2 > 0.3)


def _square(x: Plane, y: Plane) -> Mask:
    return np.maximum(abs(x), abs(y)) < 0.85


def _triangle(x: Plane, y: Plane) -> Mask:
    return (y < 0.8) & (y > 2 * abs(x) - 1)


def _cross(x: Plane, y: Plane) -> Mask:
    return (np.minimum(abs(x), abs(y)) < 0.33) & (np.maximum(abs(x), abs(y)) < 1)


SHAPES: dict[str, Callable[[Plane, Plane], Mask]] = {
    "cross": _cross,
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
}
TEXTURES = ("horizontal", "vertical")
CLASSES = [f"{shape}_{texture}" for shape in SHAPES for texture in TEXTURES]


@dataclass(frozen=True)
class DemoOptions:
    """Write the demo data set: train/CLASS/*.JPEG and val/CLASS/*.JPEG."""

    output: Path
    """Folder to create."""

    train: int = 100
    """Training images per class."""

    val: int = 20
    """Validation images per class."""

    seed: int = 0
    """The same seed gives the same pixels."""

    def __post_init__(self) -> None:
        require_count("--train", self.train, "image", 10**6)
        require_count("--val", self.val, "image", 10**6)
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: must be 0 or a positive number")


def write(options: DemoOptions) -> None:
    """Write both splits completely or not at all. Raises UsageError if `output` exists already."""
    if options.output.exists():
        raise UsageError(f"--output: {options.output} exists already")
    with atomic_directory(options.output) as temporary:
        for number, (split, count) in enumerate((("train", options.train), ("val", options.val))):
            for label in range(len(CLASSES)):
                _write_class(temporary / split, label, count, (options.seed, number))


def _write_class(split: Path, label: int, count: int, seed: tuple[int, int]) -> None:
    """Write `count` images of a class; the first image of each of the first classes is of an odd kind."""
    name = CLASSES[label]
    (split / name).mkdir(parents=True)
    for i in range(count):
        is_odd = i == 0 and label < len(ODD_KINDS)
        save = ODD_KINDS[label] if is_odd else _save_plain
        file = io.BytesIO()  # for a full disk PIL raises errors of its own
        save(file, render(name, np.random.default_rng((*seed, label, i))))
        (split / name / f"{name}_{i:04}.JPEG").write_bytes(file.getvalue())


def write_demo(options: DemoOptions) -> int:
    """Write the data set; return the exit code."""
    write(options)
    return 0


def render(name: str, rng: np.random.Generator) -> Image.Image:
    """Render an RGB image of class `name`, 100 to 500 pixels a side."""
    shape, texture = name.split("_")
    height, width = rng.integers(100, 501, 2)
    short = min(height, width)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    radius = short * rng.uniform(0.32, 0.45)
    center = [rng.uniform(0.4, 0.6) * side for side in (height, width)]
    mask = SHAPES[shape]((x - center[1]) / radius, (y - center[0]) / radius)

    along = y if texture == "horizontal" else x
    period = short / rng.uniform(21, 27)
    stripes = (np.sin(2 * np.pi * (along / period + rng.random())) > 0).astype(np.float64)
    # A bright shape on a dark ground, both in any hue; the stripes are a third as deep as the contrast.
    back = rng.uniform(20, 90, 3) + rng.normal(0, 4, (height, width, 1))
    fore = rng.uniform(150, 230, 3) * (0.75 + 0.25 * (2 * stripes[..., None] - 1))
    pixels = np.where(mask[..., None], fore, back)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _save_plain(file: IO[bytes], image: Image.Image, **options: Any) -> None:
    image.save(file, "JPEG", quality=90, **options)


def _save_cmyk(file: IO[bytes], image: Image.Image) -> None:
    _save_plain(file, image.convert("CMYK"))


def _save_png(file: IO[bytes], image: Image.Image) -> None:
    image.save(file, "PNG")


def _save_gray(file: IO[bytes], image: Image.Image) -> None:
    _save_plain(file, image.convert("L"))


def _save_exif(file: IO[bytes], image: Image.Image) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = ROTATE_90
    _save_plain(file, image, exif=exif)


def _save_progressive(file: IO[bytes], image: Image.Image) -> None:
    _save_plain(file, image, progressive=True)


ODD_KINDS = (_save_cmyk, _save_png, _save_gray, _save_exif, _save_progressive)


if __name__ == "__main__":
    sys.exit(command("pipelines.demo", DemoOptions, write_demo))

"""Image folder to .beton files: `python -m pipelines.beton --data /imagenet --output /imagenet_beton`.

The options, and the command; `beton_convert` does the work.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from pipelines.cli import command
from pipelines.errors import UsageError
from pipelines.ffcv import not_installed

Split = Literal["train", "val"]
WriteMode = Literal["jpg", "raw", "proportion"]


@dataclass(frozen=True)
class ConvertOptions:
    """Write train.beton and val.beton, each with a sidecar, or check one that is there."""

    data: Annotated[Path | None, arg(aliases=("-d",), metavar="DIR")] = None
    """Folder with train/CLASS/IMAGE and val/CLASS/IMAGE."""

    output: Annotated[Path | None, arg(aliases=("-o",), metavar="DIR")] = None
    """Folder for the files; what is in it is not overwritten."""

    splits: tuple[Split, ...] = ("train", "val")
    """What to convert."""

    write_mode: WriteMode = "jpg"
    """jpg: JPEGs. raw: pixels. proportion: JPEGs and pixels, by --compress-probability."""

    max_resolution: Annotated[int | None, arg(metavar="PIXELS")] = None
    """Images with a longer side are shrunk to it. Unset: none; JPEGs are stored as they are."""

    jpeg_quality: int = 90
    """Of the images that have to be encoded anew, 1 to 100."""

    compress_probability: float = 0.5
    """Share of JPEGs with --write-mode proportion, 0 to 1."""

    workers: Annotated[int, arg(aliases=("-j",))] = field(
        default_factory=lambda: len(os.sched_getaffinity(0))
    )
    """Threads that read, decode and encode."""

    subset: Annotated[int | None, arg(metavar="N")] = None
    """Only N images of each split, spread over the classes."""

    skip_bad: bool = False
    """Leave broken images out, and list them in the sidecar."""

    verify: Annotated[Path | None, arg(metavar="FILE")] = None
    """Convert nothing: decode every sample of this .beton file and report the broken ones."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: at least one thread is needed")
        if self.subset is not None and self.subset < 1:
            raise UsageError(f"--subset {self.subset}: at least one image is needed")
        if self.max_resolution is not None and self.max_resolution < 32:
            raise UsageError(f"--max-resolution {self.max_resolution}: at least 32 pixels")
        if not 1 <= self.jpeg_quality <= 100:
            raise UsageError(f"--jpeg-quality {self.jpeg_quality}: from 1 to 100")
        if not 0 <= self.compress_probability <= 1:
            raise UsageError(
                f"--compress-probability {self.compress_probability}: a share from 0 to 1"
            )
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise UsageError("--splits: each split once, at least one")


def main(options: ConvertOptions) -> int:
    """Returns the exit code. Raises UsageError or DataError, in one line."""
    try:
        from pipelines.beton_convert import convert
        from pipelines.beton_verify import verify
    except ImportError as error:
        raise not_installed(error) from error
    if options.verify is not None:
        return verify(options.verify, options.workers)
    if options.data is None or options.output is None:
        raise UsageError(
            "--data and --output are needed, or --verify FILE (--help lists all options)"
        )
    convert(options, options.data, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(command("pipelines.beton", ConvertOptions, main))

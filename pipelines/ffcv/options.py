"""Options of reading and writing .beton files. Importing them needs no FFCV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from pipelines.image_formats import (
    DEFAULT_MAX_MEGAPIXELS,
    require_megapixels,
    require_strict_of_skip_bad,
)
from pipelines.sources.cache_options import CacheOptions
from pipelines.sources.options import SplitOptions
from pipelines.utils.bounds import require_prefetch, require_workers
from pipelines.utils.cores import default_workers
from pipelines.utils.errors import UsageError
from pipelines.utils.memory import is_out_of_memory

Order = Literal["random", "quasi-random"]


@dataclass(frozen=True)
class FfcvOptions:
    """Reading .beton files."""

    workers: Annotated[int, arg(aliases=("-j",))] = field(default_factory=default_workers)
    """CPU threads that read, decode and resize. Unset: 4; with GPUs, this process's cores over the
    machine's GPUs, 16 at most."""

    prefetch: int = 3
    """Batches prepared ahead."""

    os_cache: bool = True
    """Keep what was read in the operating system's page cache; --no-os-cache drops pages once an epoch has
    finished with them, for data larger than memory.
    """

    order: Order = "random"
    """random: all samples are shuffled. quasi-random: a gigabyte at a time, read in pages of 8 MB, for
    disks that are slow at random reads."""

    trust: bool = False
    """Do not check every sample of a file that has no sidecar."""

    def __post_init__(self) -> None:
        require_workers(self.workers)
        require_prefetch(self.prefetch)
        if not self.os_cache and self.order == "random":
            raise UsageError(
                "--no-os-cache: in random order every page of the file is needed until the epoch ends; "
                "add --order quasi-random"
            )


@contextmanager
def importing_ffcv() -> Iterator[None]:
    """Raise UsageError if FFCV, which the block imports, is not installed."""
    try:
        yield
    except ImportError as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"FFCV cannot be imported ({error}); install it with make install in a "
            "checkout, or train by DALI (rsnet train --pipeline dali), which needs no FFCV"
        ) from error


Split = Literal["train", "val"]
WriteMode = Literal["jpg", "raw", "proportion"]


@dataclass(frozen=True)
class ConvertOptions(CacheOptions):
    """Write train.beton and val.beton, each with a sidecar, or check one that is there."""

    data: Annotated[str | None, arg(aliases=("-d",), metavar="DIR")] = None
    """Folder with train/CLASS/IMAGE and val/CLASS/IMAGE, table of paths, or tar shards."""

    val_data: Annotated[str | None, arg(metavar="DIR")] = None
    """Validation images of their own, in place of those in --data."""

    val_fraction: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Share of the training images for validation, chosen by their names, where there are no others."""

    output: Annotated[Path | None, arg(aliases=("-o",), metavar="DIR")] = None
    """Folder for the files; what is in it is not overwritten."""

    splits: tuple[Split, ...] = ("train", "val")
    """Splits to convert."""

    write_mode: WriteMode = "jpg"
    """jpg: JPEGs. raw: pixels. proportion: JPEGs and pixels, by --compress-probability."""

    max_resolution: Annotated[int | None, arg(metavar="PIXELS")] = None
    """Images with a longer side are shrunk to it. Unset: none; JPEGs are stored as they are."""

    jpeg_quality: int = 90
    """JPEG quality of images that have to be encoded again, 1 to 100."""

    compress_probability: float = 0.5
    """Share of JPEGs with --write-mode proportion, 0 to 1."""

    workers: Annotated[int, arg(aliases=("-j",))] = field(
        default_factory=lambda: len(os.sched_getaffinity(0))
    )
    """Threads that read, decode and encode."""

    subset: Annotated[int | None, arg(metavar="N")] = None
    """Convert only N images of each split, spread over the classes."""

    skip_bad: bool = False
    """Leave broken images out, and list them in the sidecar."""

    strict: bool = False
    """With --skip-bad: leave out JPEGs, too, that decode with errors."""

    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
    """Larger images are broken: a file of kilobytes can claim gigabytes."""

    verify: Annotated[Path | None, arg(metavar="FILE")] = None
    """Convert nothing: decode every sample of this .beton file and report the broken ones."""

    @property
    def placed(self) -> SplitOptions:
        """Where the validation images are."""
        return SplitOptions(self.val_data, self.val_fraction)

    def __post_init__(self) -> None:
        super().__post_init__()
        SplitOptions(self.val_data, self.val_fraction)  # checks them
        require_workers(self.workers)
        require_megapixels(self.max_megapixels)
        require_strict_of_skip_bad(self.strict, self.skip_bad)
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

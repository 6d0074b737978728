"""Options of the DALI pipeline and of `rsnet verify`. Importing them needs no DALI."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from pipelines.image_formats import (
    DEFAULT_MAX_MEGAPIXELS,
    require_megapixels,
    require_strict_of_skip_bad,
)
from pipelines.sources.cache_options import CacheOptions
from pipelines.utils.bounds import require_prefetch, require_workers
from pipelines.utils.cores import default_workers
from pipelines.utils.errors import UsageError

Order = Literal["random", "shards"]
WINDOW = 16  # shards


@dataclass(frozen=True)
class DaliOptions(CacheOptions):
    """Reading with DALI."""

    workers: Annotated[int, arg(aliases=("-j",))] = field(default_factory=default_workers)
    """CPU threads that read and decode; without a GPU as many more resize. Unset: 4; with GPUs, this
    process's cores over the machine's GPUs, 16 at most."""

    decoder_hw_load: float = 0.65
    """Share of the images that the GPU's JPEG engine decodes (A100, H100, ...), 0 to 1."""

    prefetch: int = 2
    """Batches prepared ahead."""

    order: Order = "random"
    """random: all samples are shuffled. shards: tar shards are shuffled, and then the samples within each
    window of --order-window shards, so that few shards are read at a time; each node reads a share of the
    shards.
    """

    order_window: Annotated[int | None, arg(metavar="SHARDS")] = None
    """Shards per window of --order shards, within which samples are shuffled. Unset: 16."""

    skip_bad: bool = False
    """Leave out the images that `rsnet verify` found to be broken."""

    strict: bool = False
    """With --skip-bad: also leave out images that decode with errors."""

    skip_bad_report: Annotated[Path | None, arg(metavar="FILE")] = None
    """Report of `rsnet verify --report`. Unset: the file that verify writes by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_workers(self.workers)
        if not 0 <= self.decoder_hw_load <= 1:
            raise UsageError(f"--decoder-hw-load {self.decoder_hw_load}: a share from 0 to 1")
        require_prefetch(self.prefetch)
        require_strict_of_skip_bad(self.strict, self.skip_bad)
        if self.order_window is not None and not 1 <= self.order_window <= 1_000_000:
            raise UsageError(f"--order-window {self.order_window}: 1 to 1000000 shards")
        if self.order_window is not None and self.order != "shards":
            raise UsageError("--order-window: add --order shards, to which it belongs")
        if self.skip_bad_report and not self.skip_bad:
            raise UsageError("--skip-bad-report: add --skip-bad to leave out what it lists")

    @property
    def window(self) -> int | None:
        """Shards that are mixed; None for all samples."""
        return (self.order_window or WINDOW) if self.order == "shards" else None


@dataclass(frozen=True)
class VerifyOptions(CacheOptions):
    """Decode every image with DALI, and list those that it cannot decode.

    The result is stored in a report, which `rsnet train --skip-bad` reads; while the images do not change,
    verifying again only reads the report. Exit code: 0 if no bad image is left, 1 if there is one.
    """

    data: Positional[Annotated[str, arg(metavar="DIR")]]
    """Folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or one of the two; folder of classes, table of
    paths, or tar shards, also in object storage (s3://...)."""

    workers: Annotated[int, arg(aliases=("-j",))] = field(
        default_factory=lambda: len(os.sched_getaffinity(0))
    )
    """Threads that read and decode."""

    report: Annotated[Path | None, arg(metavar="FILE")] = None
    """File for the result. Unset: verified.json in or beside the data, of a table TABLE.verified.json."""

    move_to: Annotated[Path | None, arg(metavar="DIR")] = None
    """Move the bad images to this folder, keeping their relative paths."""

    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
    """Treat larger images as bad: a small file can decode to gigabytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_workers(self.workers)
        require_megapixels(self.max_megapixels)

"""FFCV: batches from train.beton and val.beton, which `python -m pipelines.beton` writes.

This module alone can be imported where FFCV is not installed: its options, and the line that says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from pipelines.batch import Loaders, LoaderSpec
from pipelines.errors import UsageError

Order = Literal["random", "quasi-random"]


@dataclass(frozen=True)
class FfcvOptions:
    """Reading .beton files."""

    workers: Annotated[int, arg(aliases=("-j",))] = 4
    """CPU threads that read, decode and resize."""

    prefetch: int = 3
    """Batches that are prepared ahead."""

    os_cache: bool = True
    """Leave what was read in the operating system's cache; --no-os-cache drops the pages of the file that
    an epoch is done with, for data larger than memory."""

    order: Order = "random"
    """random: all samples are shuffled. quasi-random: a gigabyte at a time, read in pages of 8 MB, for
    disks that are slow at random reads."""

    trust: bool = False
    """Do not check every sample of a file that has no sidecar."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: at least one thread is needed")
        if self.prefetch < 1:
            raise UsageError(f"--prefetch {self.prefetch}: at least one batch is needed")
        if not self.os_cache and self.order == "random":
            raise UsageError(
                "--no-os-cache: in random order every page of the file is needed until the epoch ends; "
                "add --order quasi-random"
            )


def make_loaders(options: FfcvOptions, spec: LoaderSpec, with_train: bool = True) -> Loaders:
    """Loaders over `spec.data`/train.beton and /val.beton.

    Raises UsageError if FFCV or a file is missing or augmentation is asked for, DataError if a file is
    broken.
    """
    if with_train and spec.auto_augment is not None:
        raise UsageError(
            f"--auto-augment {spec.auto_augment}: train_ffcv.py has no automatic augmentation; "
            "use train_dali.py, or leave it out"
        )
    try:
        from pipelines.ffcv_open import open_loaders
    except ImportError as error:
        raise not_installed(error) from error
    return open_loaders(options, spec, with_train)


def not_installed(error: ImportError) -> UsageError:
    """The line for a machine on which FFCV could not be built."""
    return UsageError(
        f"FFCV cannot be imported ({error}); install it with ./install.sh, "
        "or use train_dali.py, which needs no FFCV"
    )

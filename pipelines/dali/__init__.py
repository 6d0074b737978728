"""Loaders for image folders, tables and tar shards by DALI, on a GPU or on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.dali.options import DaliOptions

if TYPE_CHECKING:
    from pipelines.batch import Loaders, LoaderSpec

__all__ = ["DaliOptions", "make_loaders"]


def make_loaders(options: DaliOptions, spec: LoaderSpec, with_train: bool = True) -> Loaders:
    """Return loaders over the splits of `spec.data`. Raises UsageError if it is malformed, or with
    --skip-bad if it was not verified.
    """
    from pipelines.dali.loader import open_loaders  # DALI takes a second to import

    return open_loaders(options, spec, with_train)

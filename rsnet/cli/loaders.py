"""The loaders of a data folder, whichever pipeline reads it. Here alone rsnet reaches DALI and FFCV."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.batch import Loaders, LoaderSpec


def make_loaders(spec: LoaderSpec, with_train: bool) -> Loaders:
    """Open .beton files by FFCV if `spec.data` has them, else an image folder by DALI.

    Raises what the pipelines' own `make_loaders` do.
    """
    if any(spec.data.glob("*.beton")):
        from pipelines import ffcv

        return ffcv.make_loaders(ffcv.FfcvOptions(), spec, with_train)
    from pipelines import dali

    return dali.make_loaders(dali.DaliOptions(), spec, with_train)

"""The loaders of a data folder, whichever pipeline reads it. Here alone rsnet reaches DALI and FFCV."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.sources.cache_options import DEFAULT_CACHE, CacheOptions
from pipelines.utils.errors import UsageError
from pipelines.utils.location import location
from pipelines.utils.output import say

if TYPE_CHECKING:
    from pipelines.batch import Loaders, LoaderSpec

Pipeline = Literal["dali", "ffcv"]


def chosen_pipeline(data: str | Path, pipeline: Pipeline | None) -> Pipeline:
    """Return the pipeline that reads `data`, unless one is asked for: FFCV .beton files, DALI all else."""
    return pipeline or ("ffcv" if has_beton(data) else "dali")


def has_beton(data: str | Path) -> bool:
    """Return whether it is a folder of this machine with .beton files."""
    place = location(data)
    return isinstance(place, Path) and any(place.glob("*.beton"))


def say_if_trained_on(
    config: Mapping[str, Any], data: str | Path, val_fraction: float | None
) -> None:
    """Say, on stderr, if an evaluation is to have images that the network was trained on.

    config: the options of its training, as far as they are known. val_fraction: of the evaluation; a smaller
    share than the training's has some of its validation images alone.
    """
    left = config.get("val_fraction")
    if left is None or (val_fraction is not None and val_fraction <= left):
        return
    here, there = Path(data).resolve(), Path(config["data"]).resolve()
    if there in (here, *here.parents):
        say(
            f"note: the training left --val-fraction {left:g} of these images for validation, and saw the "
            "others: give the same here",
            sys.stderr,
        )


def make_loaders(
    spec: LoaderSpec,
    with_train: bool,
    pipeline: Pipeline | None = None,
    workers: int | None = None,
    *,
    skip_bad: bool = False,
    cache: CacheOptions = DEFAULT_CACHE,
) -> Loaders:
    """Open .beton files by FFCV if `spec.data` has them, else an image folder by DALI, or as `pipeline` says.

    workers: threads; None for the pipeline's own number. skip_bad: leave out what `rsnet verify` found.
    cache: for shards in object storage.

    Raises what the pipelines' own `make_loaders` do.
    """
    options: dict[str, Any] = {} if workers is None else {"workers": workers}
    if chosen_pipeline(spec.data, pipeline) == "ffcv":
        from pipelines import ffcv

        if skip_bad:
            raise UsageError(
                "--skip-bad: a .beton file has no image that cannot be decoded; leave it out"
            )
        return ffcv.make_loaders(ffcv.FfcvOptions(**options), spec, with_train)
    from pipelines import dali

    options |= {"cache": cache.cache, "cache_size": cache.cache_size, "skip_bad": skip_bad}
    return dali.make_loaders(dali.DaliOptions(**options), spec, with_train)

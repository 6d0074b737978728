"""DALI's loaders for as long as something is measured with them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from pipelines import dali
from pipelines.batch import Loaders, LoaderSpec
from pipelines.dali import DaliOptions
from pipelines.utils.errors import UsageError


@contextmanager
def opened(spec: LoaderSpec, options: DaliOptions) -> Iterator[Loaders]:
    """Open them without a word about the folder, and close them."""
    with redirect_stdout(io.StringIO()):
        loaders = dali.make_loaders(options, spec)
    try:
        yield loaders
    finally:
        loaders.close()


def require_photos(data: Path) -> None:
    """Raise UsageError if it does not hold train/ and val/: else every check and setting would fail by it."""
    if missing := [split for split in ("train", "val") if not (data / split).is_dir()]:
        raise UsageError(
            f"--data {data}: there is no folder {data / missing[0]}; it takes train/ and val/"
        )

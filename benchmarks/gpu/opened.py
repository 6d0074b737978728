"""DALI's loaders for as long as something is measured with them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from pipelines import dali
from pipelines.batch import Loaders, LoaderSpec
from pipelines.dali import DaliOptions


@contextmanager
def opened(spec: LoaderSpec, options: DaliOptions) -> Iterator[Loaders]:
    """Open them without a word about the folder, and close them."""
    with redirect_stdout(io.StringIO()):
        loaders = dali.make_loaders(options, spec)
    try:
        yield loaders
    finally:
        loaders.close()

"""Training and evaluation from image folders by DALI, on a GPU or on the CPU."""

from __future__ import annotations

from pipelines.batch import Loaders, LoaderSpec
from pipelines.dali.options import DaliOptions

__all__ = ["DaliOptions", "make_loaders"]


def make_loaders(options: DaliOptions, spec: LoaderSpec, with_train: bool = True) -> Loaders:
    """Return loaders over `spec.data`/train and /val.

    Raises UsageError on a malformed folder, and with --skip-bad on one that was not verified.
    """
    from pipelines.dali.loader import open_loaders  # DALI takes a second to import

    return open_loaders(options, spec, with_train)

"""Training and evaluation from .beton files, FFCV's format, and the converter that makes them.

The options can be imported without FFCV; what needs it says in one line that it is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.ffcv.options import ConvertOptions, FfcvOptions, importing_ffcv
from pipelines.utils.errors import UsageError

if TYPE_CHECKING:
    from pipelines.batch import Loaders, LoaderSpec

__all__ = ["ConvertOptions", "FfcvOptions", "convert_or_verify", "make_loaders"]


def make_loaders(options: FfcvOptions, spec: LoaderSpec, with_train: bool = True) -> Loaders:
    """Return loaders over `spec.data`/train.beton and /val.beton.

    Raises UsageError if FFCV or a file is missing, DataError if a file is broken.
    """
    with importing_ffcv():
        from pipelines.ffcv.loader import open_loaders
    return open_loaders(options, spec, with_train)


def convert_or_verify(options: ConvertOptions) -> int:
    """Convert images, or verify a .beton file; return the exit code.

    Raises UsageError for a mistake in the options or a missing FFCV, DataError for broken data.
    """
    with importing_ffcv():
        from pipelines.ffcv.convert import convert
        from pipelines.ffcv.verify import verify
    if options.verify is not None:
        return verify(options.verify, options.workers)
    if options.data is None or options.output is None:
        raise UsageError(
            "--data and --output are needed, or --verify FILE (--help lists all options)"
        )
    convert(options, options.data, options.output)
    return 0

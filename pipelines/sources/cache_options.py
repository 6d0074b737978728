"""Where shards in object storage are kept on this machine."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from pipelines.utils.errors import UsageError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Object storage."""

    cache: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder to which shards in object storage are prefetched; all processes of a machine may share it.
    Unset: rsnet in XDG_CACHE_HOME or ~/.cache.
    """

    cache_size: Annotated[str | None, arg(metavar="SIZE")] = None
    """Largest size of --cache in bytes: a number with K, M, G or T, such as 200GB. Unset: half of its
    disk's free space.
    """

    def __post_init__(self) -> None:
        _ = self.size  # checks it

    @property
    def folder(self) -> Path:
        """The folder, whose default depends on the user."""
        return (
            self.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsnet"
        )

    @property
    def size(self) -> int | None:
        """The bytes, at most; None for what the disk gives."""
        if self.cache_size is None:
            return None
        return size_in_bytes("--cache-size", self.cache_size, "200GB")


DEFAULT_CACHE = CacheOptions()


def size_in_bytes(flag: str, given: str, example: str) -> int:
    """Return a size that is written as text, such as 1GB. Raises UsageError, which names the option."""
    text = given.upper().removesuffix("B")
    number, unit = (text[:-1], text[-1]) if text.endswith(tuple("KMGT")) else (text, "")
    try:
        size = float(number) * UNITS[unit]
    except ValueError:
        size = float("nan")
    if not 10**4 <= size < 10**15:
        raise UsageError(f"{flag} {given}: such as {example}, from 10KB to 1000TB")
    return int(size)


def size_as_option(size: int) -> str:
    """Return a number of bytes, or some more, as an option's value."""
    return f"{math.ceil(size / 1e9)}GB" if size > 1e9 else f"{math.ceil(size / 1e6)}MB"

"""Where data lies: a path of this machine, or a URL of object storage; and patterns of many files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from pipelines.utils.errors import UsageError


class Url(str):
    """The address of what lies in object storage, or a pattern of such addresses."""

    __slots__ = ()

    @property
    def scheme(self) -> str:
        """Such as s3."""
        return self.partition("://")[0]

    @property
    def name(self) -> str:
        """What it is called: the last folder, or the bucket or host."""
        parts = self.partition("://")[2].rstrip("/").split("/")
        if len(parts) > 1 and is_pattern(parts[-1]):
            parts.pop()
        return parts[-1]


# What can be read, and by which library of fsspec's.
SCHEMES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}

Location: TypeAlias = Path | Url


def location(given: str | Path) -> Location:
    """Return a path, or a URL for what is written as one.

    Raises UsageError for a URL with a password or a query, which would be written to logs.
    """
    text = str(given)
    if isinstance(given, Path):  # which makes one slash of two
        text = re.sub(rf"^({'|'.join(SCHEMES)}):/(?!/)", r"\1://", text)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return Path(given)
    parts = urlsplit(text)
    if parts.scheme == "file":
        return Path(parts.path)
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme in ("http", "https") and "=" in parts.query:
        raise UsageError(
            f"{parts.scheme}://{host}{parts.path}?...: a URL with a query would be written to logs; "
            "give one without"
        )
    if host != parts.netloc and parts.scheme != "hf":
        raise UsageError(
            f"{parts.scheme}://...@{host}{parts.path}: a URL with a password would be written to logs; "
            "give it to the environment, or to ~/.netrc"
        )
    if parts.scheme not in SCHEMES:
        raise UsageError(f"{text}: URLs can begin with {', '.join(f'{s}://' for s in SCHEMES)}")
    return Url(text.rstrip("/"))


def local_path(given: str | Path, what: str) -> Path:
    """Return a path. Raises UsageError, which says `what` is read from this machine alone, for a URL."""
    found = location(given)
    if isinstance(found, Url):
        raise UsageError(f"{found}: {what} are read from this machine alone: download them first")
    return found


def is_pattern(text: str) -> bool:
    """Return whether a path or URL is meant for shards."""
    return text.endswith(".tar") or bool(re.search(r"[*?{]", text))


def of_split(pattern: str, split: str) -> str:
    """Return a pattern with the name of a split in place of both, `{TRAIN,VAL}`, if it has them."""
    found = _BOTH.search(pattern)
    if found is None:
        return pattern
    name = found[1] if split == "train" else found[2]
    return pattern[: found.start()] + name + pattern[found.end() :]


def has_splits(pattern: str) -> bool:
    """Return whether a pattern names both splits."""
    return _BOTH.search(pattern) is not None


def expanded(pattern: str) -> list[str]:
    """Return a pattern with each number of its ranges, as of `{000000..000146}`, in their order."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + MOST_SHARDS:
        raise UsageError(f"{pattern}: {found[0]} is no range of up to {MOST_SHARDS} numbers")
    rest = expanded(pattern[found.end() :])
    width = len(found[1])
    return [
        f"{pattern[: found.start()]}{i:0{width}}{tail}"
        for i in range(first, last + 1)
        for tail in rest
    ]


MOST_SHARDS = 10**6
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # as webdataset writes them
_PART = r"((?:[^{},]|\{[^{},]*\})*)"  # it may have a range
_BOTH = re.compile(rf"\{{{_PART},{_PART}\}}")

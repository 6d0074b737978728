"""Where data, runs and files lie: a path of this machine, or a URL of object storage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from pipelines.utils.errors import UsageError

# What can be read, and by which library.
SCHEMES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
WRITABLE = ("s3", "gs")  # a file on the Hugging Face hub would be a commit


class Url(str):
    """The address of what lies in object storage, or a pattern of such addresses; no slash ends it."""

    __slots__ = ()

    @property
    def scheme(self) -> str:
        """Such as s3."""
        return self.partition("://")[0]

    @property
    def name(self) -> str:
        """What it is called: its last part."""
        return self.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """The folder that it lies in."""
        return Url(self.rpartition("/")[0])


Location: TypeAlias = Path | Url


def location(given: str | Path) -> Location:
    """Return a path, or a URL for what is written as one.

    Raises UsageError for a URL with a password or a query, which would be written to logs.
    """
    # A Path makes one slash of two; typed so, it is hardly meant for a folder that is called s3:.
    text = re.sub(rf"^((?i:{'|'.join(SCHEMES)})):/(?!/)", r"\1://", str(given))
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return Path(given)
    try:
        parts = urlsplit(text)
    except ValueError:  # which quotes what may be a password
        scheme = text.partition(":")[0]
        raise UsageError(
            f"{scheme}://...: its host is not valid; check brackets and special characters"
        ) from None
    if parts.scheme == "file":
        return Path(unquote(parts.path))
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
    return Url(f"{parts.scheme}{text[len(parts.scheme) :]}".rstrip("/"))  # also of S3://


def url_of(given: object) -> Url | None:
    """Return the URL that a path's option or argument is; None if it is a path, or nothing.

    Raises as `location`.
    """
    found = location(given if isinstance(given, Path) else str(given or ""))
    return Url(re.sub("(?<!:)/+", "/", found)) if isinstance(found, Url) else None


def require_writable(url: Url) -> None:
    """Raise UsageError for what cannot be written to."""
    if url.scheme not in WRITABLE or not url.name:
        known = " or ".join(f"{scheme}://BUCKET/FOLDER" for scheme in WRITABLE)
        raise UsageError(f"{url}: a URL of object storage is {known}")


def local_path(given: str | Path, what: str) -> Path:
    """Return a path. Raises UsageError, which says `what` is read from this machine alone, for a URL."""
    found = location(given)
    if isinstance(found, Url):
        raise UsageError(f"{found}: {what} are read from this machine alone: download them first")
    return found

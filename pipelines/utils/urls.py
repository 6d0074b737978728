"""Addresses in object storage, where an option or argument takes a path, too."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.utils.errors import UsageError

# What can be written to, and the library that does so for fsspec.
SCHEMES = {"s3": "s3fs", "gs": "gcsfs"}

_OF_PATH = re.compile(rf"({'|'.join(SCHEMES)}):/(?!/)")


def url_of(given: object) -> str | None:
    """Return the URL that `given` is, without a slash at its end; None if it is a path.

    A Path has made one of the two slashes that follow each other.

    Raises UsageError for a URL with a password, which would be written to logs.
    """
    text = str(given or "")
    if isinstance(given, Path):
        text = _OF_PATH.sub(r"\1://", text, count=1)
    scheme, separator, rest = text.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return None
    if "@" in rest.partition("/")[0]:
        raise UsageError(
            f"{scheme}://...: a URL with a password would be written to logs; give it to the environment"
        )
    return f"{scheme}://{re.sub('/+', '/', rest).strip('/')}"


def name_of(url: str) -> str:
    """Return the last part of a URL."""
    return url.rpartition("/")[2]

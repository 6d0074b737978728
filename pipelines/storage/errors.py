"""Errors of the object-storage libraries: which are worth a retry, and what each means in one line."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from pipelines.utils.errors import RunError, UsageError, first_line

STALL = 30.0  # seconds without a byte after which a request is tried again
LONGEST_ASKED = 300.0  # seconds that are waited because the storage asks for it
ONCE_MORE = (408, 425, 429)  # of the client's errors, those that another try may not meet

NO_CREDENTIALS = {
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}

CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true",
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "http": "put name and password into ~/.netrc",
    "https": "put name and password into ~/.netrc",
}


class Changed(Exception):  # noqa: N818
    """The object is no longer what was listed."""


def is_final(error: Exception) -> bool:
    """Return whether another try would meet the same error."""
    status = status_of(error)
    if status is not None and 400 <= status < 500:
        return status not in ONCE_MORE
    kinds = {type(one).__name__ for one in (error, error.__cause__)}
    return bool(kinds & NO_CREDENTIALS) or isinstance(
        error, Changed | FileNotFoundError | PermissionError | ValueError | TypeError
    )


def explained(url: str, error: Exception) -> UsageError | RunError:
    """Return what ends a command, for an error of reading or writing a URL that is final."""
    status = status_of(error)
    scheme = url.partition("://")[0]
    kinds = {type(one).__name__ for one in (error, error.__cause__)}
    if status == 412 or isinstance(error, Changed):
        return RunError(
            f"{url} changed after the training began to read it; start again once it no longer changes"
        )
    if kinds & NO_CREDENTIALS:
        return UsageError(f"{url}: {first_line(error)}; {CREDENTIALS[scheme]}")
    if isinstance(error, PermissionError) or status in (401, 403):
        return UsageError(f"{url}: access is denied ({first_line(error)}); {CREDENTIALS[scheme]}")
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return UsageError(f"{url}: there is no such object, or bucket")
    return UsageError(f"{url}: {words(error)}")


def status_of(error: BaseException) -> int | None:
    """Return the status of the HTTP answer that an error is about, if any."""
    # aiohttp gives the status 400 to answers that it cannot read to their end.
    if type(error.__cause__).__module__ == "aiohttp.http_exceptions":
        return None
    for one in (error, error.__cause__):
        answer = getattr(one, "response", None)
        found: Any = None
        if isinstance(answer, dict):
            found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # One after the other: aiohttp warns of whoever looks at `code`.
        for value in (found, getattr(one, "status", None)):
            if isinstance(value, int):
                return value
        for value in (getattr(one, "code", None), getattr(answer, "status_code", None)):
            if isinstance(value, int):
                return value
    return None


def words(error: Exception) -> str:
    """Return what an error says, with its status."""
    status = status_of(error)
    text = first_line(error)
    if isinstance(error, asyncio.TimeoutError) and not str(error):
        text = f"no byte came for {STALL:g} s"
    return text if status is None or str(status) in text else f"{status} {text}"


def asked_wait(error: Exception) -> float:
    """Return the seconds after which the storage wants to be asked again; 0 if it does not say."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders")
    else:
        headers = getattr(answer, "headers", None) or getattr(error, "headers", None)
    headers = headers or {}
    told = headers.get("retry-after") or headers.get("Retry-After") or ""
    # The Hugging Face hub's: r requests are left for t seconds.
    match = re.fullmatch(r"(\d+)", told) or re.search(
        r"r=0;.*t=(\d+)", headers.get("ratelimit", "")
    )
    return min(float(match[1]), LONGEST_ASKED) if match else 0.0

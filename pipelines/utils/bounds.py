"""Bounds of the options that loaders, verify and convert share."""

from __future__ import annotations

from pipelines.utils.errors import UsageError


def require_workers(workers: int) -> None:
    """Raise UsageError unless --workers is a number of threads that a machine may have."""
    require_count("--workers", workers, "thread", 1024)


def require_prefetch(prefetch: int) -> None:
    """Raise UsageError unless --prefetch is a number of batches that a memory may hold."""
    require_count("--prefetch", prefetch, "batch", 1024)


def require_count(flag: str, value: int, what: str, most: int) -> None:
    """Raise UsageError unless an option that counts something is from 1 to `most`."""
    if not 1 <= value <= most:
        raise UsageError(f"{flag} {value}: at least one {what} is needed, and {most} at most")

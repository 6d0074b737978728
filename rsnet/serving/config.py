"""Options of the server; apart from `server`, as the command line reads them without importing torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Admission, batching and limits of requests."""

    allow_host: tuple[str, ...] = ()
    """Further names by which a server that listens to this machine alone may be called, as by a proxy."""

    deadline_ms: float | None = None
    """Milliseconds that 99 of 100 answers may take, from when the image is there. Under load, requests that
    name neither size, confidence nor budget get a smaller size, and the last resort is 503."""

    batch_size: int = 8
    """Images that are computed at once, at most."""

    batch_wait_ms: float = 2.0
    """Milliseconds that an image waits for others to share a batch with."""

    queue: int = 64
    """Requests under way at once. More are refused with 503."""

    timeout: float = 10.0
    """Seconds until an image has to be there, and as many until it has to be answered."""

    max_megabytes: float = 10.0
    """Largest body of a request."""

    max_megapixels: float = 50.0
    """Largest image; decoding takes 3 MB of memory for each."""

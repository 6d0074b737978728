"""Options of the server; apart from `server`, as the command line reads them without importing torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Admission, batching and limits of requests."""

    allow_host: tuple[str, ...] = ()
    """Host names under which the server answers besides localhost, as behind a reverse proxy. Unset: none on
    127.0.0.1, elsewhere any."""

    deadline_ms: float | None = None
    """Milliseconds that 99 of 100 answers may take, from when the image has arrived. Under load, requests
    that name neither size, confidence nor budget get a smaller size and, as a last resort, status 503."""

    batch_size: int = 8
    """Largest batch of images."""

    batch_wait_ms: float = 2.0
    """Milliseconds that an image waits for others to share a batch with."""

    queue: int = 64
    """Requests under way at once; more are refused with status 503."""

    timeout: float = 10.0
    """Seconds until an image has to have arrived, and as many until it has to be answered."""

    max_megabytes: float = 10.0
    """Largest body of a request."""

    max_megapixels: float = 50.0
    """Largest image; decoding takes 4 to 11 MB of memory per megapixel, in up to four threads."""

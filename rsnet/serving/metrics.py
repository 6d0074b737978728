"""Prometheus metrics of the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Label values; any other path is of the page's files, or of none.
PATHS = ("/classify", "/compare", "/health", "/info", "/metrics")
PAGE = "page"

# Of a request that its client has left, nginx's.
LEFT = "499"

# Seconds: forwards take from a millisecond on, answers up to --timeout.
BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)  # fmt: skip


class Metrics:
    """Counters and histograms in a registry of their own, so that servers in one process share none."""

    def __init__(self, sizes: Sequence[int], under_way: Callable[[], float]) -> None:
        """Set up. under_way: returns the requests that are read, computed or waiting now."""
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "rsnet_requests", "Requests that were answered.", ["path", "code"], registry=registry
        )
        self._request_s = Histogram(
            "rsnet_request_seconds", "Seconds from a request's head to its answer's end.", ["path"],
            registry=registry, buckets=BUCKETS,
        )  # fmt: skip
        self._decided = Counter(
            "rsnet_decided",
            "Images classified, by the size that decided.",
            ["size"],
            registry=registry,
        )
        self._images = Counter(
            "rsnet_images", "Images computed at a size; a cascade computes some at several.", ["size"],
            registry=registry,
        )  # fmt: skip
        self._batch_s = Histogram(
            "rsnet_batch_seconds", "Seconds of a batch's forward.", ["size"],
            registry=registry, buckets=BUCKETS,
        )  # fmt: skip
        queue = Gauge(
            "rsnet_requests_under_way", "Requests that --queue counts.", registry=registry
        )
        queue.set_function(under_way)
        for size in sizes:  # list sizes without requests as well
            for metric in (self._decided, self._images, self._batch_s):
                metric.labels(size)

    def decided(self, size: int) -> None:
        """Count an image that was classified at `size`."""
        self._decided.labels(size).inc()

    def computed(self, size: int, images: int, ms: float) -> None:
        """Note a batch; called by the network's thread."""
        self._images.labels(size).inc(images)
        self._batch_s.labels(size).observe(ms / 1000)

    def answered(self, path: str, code: str, seconds: float) -> None:
        """Note a request. code: its status, or LEFT."""
        label = path if path in PATHS else PAGE
        self._requests.labels(label, code).inc()
        self._request_s.labels(label).observe(seconds)

    def response(self) -> Response:
        """Return the answer of GET /metrics, in Prometheus' text format."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class CountRequests:
    """Middleware that notes every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        code, has_left, start = LEFT, False, time.perf_counter()

        async def watched_receive() -> Message:
            nonlocal has_left
            message = await receive()
            # After an answer, it is its end.
            has_left = has_left or (message["type"] == "http.disconnect" and code == LEFT)
            return message

        async def watched_send(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
            await send(message)

        try:
            await self._app(scope, watched_receive, watched_send)
        except Exception:
            code = "500"
            raise
        finally:
            # A client that has disconnected does not read the answer.
            code = LEFT if has_left else code
            self._metrics.answered(scope["path"], code, time.perf_counter() - start)

"""A release behind a web page and a JSON interface: what is served, where, and how it ends."""

from __future__ import annotations

import ipaddress
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pipelines.utils.errors import DataError, UsageError
from rsnet.inference import latency
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.serving.size_controller import Cost, SizeController

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from rsnet.serving.service import Service

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How requests are admitted, batched and answered."""

    allow_host: tuple[str, ...] = ()
    """Further names by which a server that listens to this machine alone may be called, as by a proxy."""

    deadline_ms: float | None = None
    """Milliseconds that 99 of 100 answers may take, from when the image is there. Under load, requests that
    name neither size, confidence nor budget get a smaller size, and the last resort is 503."""

    batch_size: int = 8
    """Images that are computed at once, at most."""

    batch_wait_ms: float = 2.0
    """How long an image waits for others to share a batch with."""

    queue: int = 64
    """Requests under way at once. More are refused with 503."""

    timeout: float = 10.0
    """Seconds until an image has to be there, and as many until it has to be answered."""

    max_megabytes: float = 10.0
    """Largest body of a request."""

    max_megapixels: float = 50.0
    """Largest image; decoding takes 3 MB of memory for each."""


def make_service(classifier: SwitchableClassifier, config: ServerConfig) -> Service:
    """Measures latencies if none are known, or a deadline needs those of single images.

    Raises DataError for a damaged table of latencies.
    """
    from rsnet.serving.service import Service, Settings
    from rsnet.serving.upload import Limits

    table = classifier.latencies()
    most_bytes, most_pixels = (
        int(1e6 * most) for most in (config.max_megabytes, config.max_megapixels)
    )
    settings = Settings(
        Limits(most_bytes, most_pixels, config.timeout),
        config.batch_size,
        config.batch_wait_ms / 1000,
        config.queue,
        config.timeout,
    )
    controller = None
    if config.deadline_ms is not None:
        costs = _costs(classifier, table)
        ladder = [size for size, _ in latency.choices(table, classifier.accuracy)]
        controller = SizeController(config.deadline_ms, costs, ladder, config.batch_size)
    return Service(classifier, settings, controller)


def make_app(service: Service, config: ServerConfig, is_loopback: bool) -> FastAPI:
    """is_loopback: whether other machines cannot reach it."""
    from rsnet.serving.app import make_app

    classifier, table = service.classifier, service.classifier.latencies()
    info = {
        "sizes": classifier.sizes,
        "classes": classifier.num_classes,
        "accuracy": classifier.accuracy,
        "latency": {"batch_size": config.batch_size, "ms": table},
        "choices": [
            {"size": size, "from_ms": ms}
            for size, ms in latency.choices(table, classifier.accuracy)
        ],
        "deadline_ms": config.deadline_ms,
        "max_bytes": int(1e6 * config.max_megabytes),
    }
    return make_app(service, info, (*LOOPBACK, *config.allow_host) if is_loopback else None)


def make_server(app: FastAPI) -> uvicorn.Server:
    import uvicorn

    from rsnet.serving.protocol import Protocol

    return uvicorn.Server(
        uvicorn.Config(
            app, http=Protocol, ws="none", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_graceful_shutdown=5,
        )
    )  # fmt: skip


def serve_forever(app: FastAPI, listener: socket.socket, what: str) -> None:
    server = make_server(app)

    def stop(*_: Any) -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises what it caught anew in the end
        signal.signal(number, stop)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"{what}: http://{shown}:{port}/ (Ctrl-C ends)", flush=True)
    server.run([listener])


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, to which nobody can connect before it listens.

    Raises UsageError if there is no such address, DataError if it cannot be had.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # from what encodes names
        raise UsageError(f"--host {host!r}: is no name of a host") from error
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror}") from error
    # asyncio turns off Nagle's delay, of 40 ms an answer, only for sockets that say that they are TCP's.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise DataError(f"--host {host} --port {port}: {error.strerror}") from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _costs(classifier: SwitchableClassifier, table: latency.Table) -> dict[int, Cost]:
    """Medians: of a batch of one image, measured now, and of a full batch."""
    pixels = {s: [torch.zeros(s, s, 3, dtype=torch.uint8)] for s in classifier.sizes}
    single = latency.measure(lambda s: classifier.predict(pixels[s], s), classifier.sizes)
    return {s: Cost(single[s]["median"], table[s]["median"]) for s in classifier.sizes}

"""The server of a release, with a web page and a JSON interface: how it is put together, where it listens,
and how it and its connections end.
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipelines.utils.errors import DataError, UsageError
from rsnet.inference import latency
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.serving import app as routes
from rsnet.serving.config import ServerConfig
from rsnet.serving.service import Service, Settings
from rsnet.serving.size_controller import Cost, SizeController
from rsnet.serving.upload import Limits

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


# Seconds for the head of a request to be there, from the connection or the answer before.
IDLE_S = 10.0


def make_service(classifier: SwitchableClassifier, config: ServerConfig) -> Service:
    """Make the service; measure latencies if none are known, or a deadline needs those of single images.

    Raises DataError for a damaged table of latencies.
    """
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
        sizes = [size for size, _ in latency.choices(table, classifier.accuracy)]
        controller = SizeController(config.deadline_ms, costs, sizes, config.batch_size)
    return Service(classifier, settings, controller)


def make_app(service: Service, config: ServerConfig, is_loopback: bool) -> FastAPI:
    """Make the application. is_loopback: whether other machines cannot reach it."""
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
    return routes.make_app(service, info, (*LOOPBACK, *config.allow_host) if is_loopback else None)


class Protocol(H11Protocol):
    """uvicorn's, which waits for ever for a request's head, and reads on after an early answer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_request()

    def _expect_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:  # else a pipelined one has begun
            self.loop.call_later(IDLE_S, self._close_if_idle, self.cycle)

    def _close_if_idle(self, answered: Any) -> None:
        if self.cycle is answered:
            self.transport.close()


def make_server(app: FastAPI) -> uvicorn.Server:
    """Make uvicorn's server, with idle connections closed and nothing logged."""
    return uvicorn.Server(
        uvicorn.Config(
            app, http=Protocol, ws="none", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_graceful_shutdown=5,
        )
    )  # fmt: skip


def serve_forever(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    server = make_server(app)

    def stop(*_: Any) -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises what it caught anew in the end
        signal.signal(number, stop)
    server.run([listener])


def url_of(listener: socket.socket) -> str:
    """Return the address that a browser takes."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to the address; nobody can connect before it listens.

    Raises UsageError if there is no such address, DataError if it is taken or not permitted.
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
    """Return whether only this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _costs(classifier: SwitchableClassifier, table: latency.Table) -> dict[int, Cost]:
    """Return medians: of a batch of one image, measured now, and of a full batch."""
    pixels = {s: [torch.zeros(s, s, 3, dtype=torch.uint8)] for s in classifier.sizes}
    single = latency.measure(lambda s: classifier.predict(pixels[s], s), classifier.sizes)
    return {s: Cost(single[s]["median"], table[s]["median"]) for s in classifier.sizes}

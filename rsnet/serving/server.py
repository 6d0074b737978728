"""The server of a release, with a web page and a JSON interface: how it is put together, where it listens,
and how it and its connections end.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipelines.utils.errors import DataError, UsageError
from pipelines.utils.output import say
from rsnet.inference import latency
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.serving import app as routes
from rsnet.serving.config import ServerConfig
from rsnet.serving.service import Service, Settings
from rsnet.serving.size_controller import HOPELESS, Cost, SizeController
from rsnet.serving.upload import Limits

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

# Seconds for the head of a request to be there, from the connection or the answer before.
IDLE_S = 10.0
# Once the server is to end, seconds for the rest of a body, and for all answers.
LAST_BODY_S, LAST_ANSWER_S = 1.0, 5

# Connections that may be open, where the limit of descriptors is not lower; those that asyncio accepts at
# once, before any of them is looked at; and those that may wait for that.
MAX_CONNECTIONS, AT_ONCE, WAITING = 1000, 16, 1024
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

# Seconds until a lack of descriptors is said again.
SAY_AGAIN_S = 60.0


def make_service(classifier: SwitchableClassifier, config: ServerConfig) -> Service:
    """Make the service; capture CUDA graphs; measure latencies if none are known, or a deadline needs those
    of single images.

    Raises DataError for a damaged table of latencies.
    """
    if classifier.conditions["cuda_graphs"]:
        classifier.capture()
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
        fastest = min(cost.single for cost in costs.values())
        if fastest > HOPELESS * config.deadline_ms:
            raise UsageError(
                f"--deadline-ms {config.deadline_ms:g}: one image takes {fastest:.1f} ms at the fastest size"
            )
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
    is_bounded = is_loopback or config.allow_host
    return routes.make_app(service, info, (*LOOPBACK, *config.allow_host) if is_bounded else None)


class Protocol(H11Protocol):
    """uvicorn's HTTP protocol with limits that it lacks: on the number of connections, and on the time to
    wait for a request's head, for the rest of its body at shutdown, and for a client to read its answer.
    """

    _idle_since = 0.0  # on the loop's clock
    _stuck: asyncio.TimerHandle | None = None  # while a client does not read its answers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()
        if len(self.connections) > most_connections():
            self._make_room()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(IDLE_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    def shutdown(self) -> None:
        super().shutdown()
        if self.flow.write_paused:
            self.loop.call_later(LAST_BODY_S, self.transport.abort)
        if self._is_busy and self.cycle.more_body:
            self.loop.call_later(LAST_BODY_S, self._cut_off, self.cycle)

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_request(self) -> None:
        self._idle_since = self.loop.time()
        if not self._is_busy:  # else a pipelined one has begun
            self.loop.call_later(IDLE_S, self._close_if_idle, self.cycle)

    def _close_if_idle(self, answered: Any) -> None:
        if self.cycle is answered:
            self.transport.abort()  # to close it would wait for what the client has not read

    def _cut_off(self, cycle: Any) -> None:
        if cycle.more_body:
            self.transport.close()

    def _make_room(self) -> None:
        """Close the connection that has been idle the longest, or, if all have requests, this one."""
        others = [c for c in self.connections if isinstance(c, Protocol) and c is not self]
        idle = [c for c in others if not (c._is_busy or c.transport.is_closing())]
        if idle:
            min(idle, key=lambda c: c._idle_since).transport.abort()
        else:
            self.transport.write(BUSY)
            self.transport.close()


def most_connections() -> int:
    """Return the connections that may be open at once: they leave half of the descriptors to all else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


class Server(uvicorn.Server):
    """uvicorn's server, which says when it listens."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End once requests are answered, whatever is pressed again: else uvicorn ends with tracebacks."""
        if not self.should_exit:
            super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(WAITING)
        self._on_listening()


class Listener(socket.socket):
    """A socket of TCP that refuses connections where descriptors have run out, and says so now and then.

    asyncio would report each that waits with a traceback, and try again after the server has ended.
    """

    def __init__(self, family: int) -> None:
        # asyncio turns off Nagle's delay, of 40 ms an answer, only for sockets that say that they are TCP's.
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._spare = [os.open(os.devnull, os.O_RDONLY)]  # a descriptor to refuse with
        self._said = -math.inf

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection; raise BlockingIOError if none waits, or one was refused."""
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            if time.monotonic() - self._said > SAY_AGAIN_S:
                self._said = time.monotonic()
                say(f"connections are refused: {error.strerror}", sys.stderr)
            self._refuse()
            raise BlockingIOError from error

    def close(self) -> None:
        while self._spare:
            os.close(self._spare.pop())
        super().close()

    def _refuse(self) -> None:
        """Accept and close a connection, by the spare descriptor; else it would wait, and wake the loop."""
        while self._spare:
            os.close(self._spare.pop())
        with suppress(OSError):  # another thread was faster
            super().accept()[0].close()
            self._spare.append(os.open(os.devnull, os.O_RDONLY))


def make_server(app: FastAPI, on_listening: Callable[[], None] = lambda: None) -> Server:
    """Make uvicorn's server, with bounded connections and nothing logged but errors of its own.

    Its warnings are of what clients send, who could fill the log with them.
    """
    return Server(
        uvicorn.Config(
            app, http=Protocol, ws="none", loop="asyncio", log_config=None, log_level="error",
            access_log=False, server_header=False, proxy_headers=False, backlog=AT_ONCE,
            timeout_graceful_shutdown=LAST_ANSWER_S,
        ),
        on_listening,
    )  # fmt: skip


def serve_forever(
    app: FastAPI, listener: socket.socket, on_listening: Callable[[], None] = lambda: None
) -> None:
    """Serve until SIGINT or SIGTERM. on_listening: called as soon as clients are answered.

    Raises DataError if the address has been taken since it was bound.
    """
    server = make_server(app, on_listening)

    def stop(*_: Any) -> None:
        server.should_exit = True

    try:
        listener.listen(WAITING)  # another server may have come first since it was bound
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise DataError(f"--host {host} --port {port}: {error.strerror}") from error
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises what it caught anew in the end
        signal.signal(number, stop)
    server.run([listener])


def url_of(listener: socket.socket) -> str:
    """Return the address that a browser takes."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def bind(host: str, port: int) -> Listener:
    """Bind a socket to the address; nobody can connect before it listens.

    Raises UsageError if there is no such address, DataError if it is taken or not permitted.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # from what encodes names
        raise UsageError(f"--host {host!r}: is no name of a host") from error
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror}") from error
    listener = Listener(family)
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
    single = classifier.measure_batches(1)
    return {s: Cost(single[s]["median"], table[s]["median"]) for s in classifier.sizes}

"""`python -m rsnet serve`: a release behind a web page and a JSON interface."""

from __future__ import annotations

import importlib
import ipaddress
import math
import re
import signal
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from PIL import Image
from tyro.conf import Positional, arg

from pipelines.utils.errors import DataError, UsageError
from rsnet.inference import latency
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.serving.size_controller import Cost, DeadlineController

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from rsnet.serving.service import Service

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Options:
    """Serve a release: a web page that compares its sizes, and JSON. Ctrl-C ends it.

    Exit code: 0 if it was stopped, 1 if the port is taken, 2 for a mistake in the command.
    """

    release: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Folder that `python -m rsnet release` wrote."""

    host: str = "127.0.0.1"
    """Address to listen at: this machine alone. 0.0.0.0 lets in everyone who can reach it."""

    port: int = 8000
    """0 takes a free one."""

    allow_host: tuple[str, ...] = ()
    """Further names by which a server that listens to this machine alone may be called, as by a proxy."""

    device: str | None = None
    """cpu, cuda, cuda:1, ... Unset: the GPU if there is one."""

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

    top: int = 5
    """Classes to name."""


def run(options: Options) -> int:
    _check(options)
    _require_packages()
    with bind(options.host, options.port) as listener:
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        classifier = SwitchableClassifier.load(
            options.release, device, batch_size=options.batch_size, top=options.top
        )
        app = make_app(make_service(classifier, options), options, _is_loopback(listener))
        # As an error it is caught, and answered; as a warning it would end up in the server's output.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        _serve(app, listener, f"{options.release}, sizes {' '.join(map(str, classifier.sizes))}")
    return 0


def make_service(classifier: SwitchableClassifier, options: Options) -> Service:
    """Measures latencies if none are known, or a deadline needs those of single images.

    Raises DataError for a damaged table of latencies.
    """
    from rsnet.serving.service import Service, Settings
    from rsnet.serving.upload import Limits

    table = classifier.latencies()
    most_bytes, most_pixels = (
        int(1e6 * most) for most in (options.max_megabytes, options.max_megapixels)
    )
    settings = Settings(
        Limits(most_bytes, most_pixels, options.timeout),
        options.batch_size,
        options.batch_wait_ms / 1000,
        options.queue,
        options.timeout,
    )
    controller = None
    if options.deadline_ms is not None:
        costs = _costs(classifier, table)
        ladder = [size for size, _ in latency.choices(table, classifier.accuracy)]
        controller = DeadlineController(options.deadline_ms, costs, ladder, options.batch_size)
    return Service(classifier, settings, controller)


def make_app(service: Service, options: Options, is_loopback: bool) -> FastAPI:
    """is_loopback: whether other machines cannot reach it."""
    from rsnet.serving.app import make_app

    classifier, table = service.classifier, service.classifier.latencies()
    info = {
        "sizes": classifier.sizes,
        "classes": classifier.num_classes,
        "accuracy": classifier.accuracy,
        "latency": {"batch_size": options.batch_size, "ms": table},
        "choices": [
            {"size": size, "from_ms": ms}
            for size, ms in latency.choices(table, classifier.accuracy)
        ],
        "deadline_ms": options.deadline_ms,
        "max_bytes": int(1e6 * options.max_megabytes),
    }
    return make_app(service, info, (*LOOPBACK, *options.allow_host) if is_loopback else None)


def make_server(app: FastAPI) -> uvicorn.Server:
    import uvicorn

    from rsnet.serving.protocol import Protocol

    return uvicorn.Server(
        uvicorn.Config(
            app, http=Protocol, ws="none", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_graceful_shutdown=5,
        )
    )  # fmt: skip


def _serve(app: FastAPI, listener: socket.socket, what: str) -> None:
    server = make_server(app)

    def stop(*_: Any) -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises what it caught anew in the end
        signal.signal(number, stop)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"{what}: http://{shown}:{port}/ (Ctrl-C ends)", flush=True)
    server.run([listener])


def _check(options: Options) -> None:
    for name in ("timeout", "max_megabytes", "max_megapixels", "deadline_ms", "batch_wait_ms"):
        value = getattr(options, name)
        lowest = 0 if name == "batch_wait_ms" else 1e-3
        if value is not None and not (lowest <= value and math.isfinite(value)):
            raise UsageError(f"--{name.replace('_', '-')} {value}: a positive number is needed")
    most = int(Image.MAX_IMAGE_PIXELS or 0) / 1e6
    if options.max_megapixels > most:
        raise UsageError(f"--max-megapixels {options.max_megapixels}: PIL takes {most:.0f} at most")
    for name in options.allow_host:
        if not re.fullmatch(r"\*|(\*\.)?[\w.-]+", name):
            raise UsageError(
                f"--allow-host {name}: give a name alone, as photos.example or *.example"
            )
    if options.queue < 1:
        raise UsageError(f"--queue {options.queue}: at least 1 is needed")
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port {options.port}: a number from 0 to 65535 is needed")


def _require_packages() -> None:
    for name in ("fastapi", "uvicorn", "python_multipart"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UsageError(
                f"{name}, which serves, is not installed; `uv sync --extra serve`"
            ) from None


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


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _costs(classifier: SwitchableClassifier, table: latency.Table) -> dict[int, Cost]:
    """Medians: of a batch of one image, measured now, and of a full batch."""
    pixels = {s: [torch.zeros(s, s, 3, dtype=torch.uint8)] for s in classifier.sizes}
    single = latency.measure(lambda s: classifier.predict(pixels[s], s), classifier.sizes)
    return {s: Cost(single[s]["median"], table[s]["median"]) for s in classifier.sizes}

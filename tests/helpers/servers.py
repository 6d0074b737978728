"""A server of this process, with the protocol and the settings that `serve` uses."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
from fastapi import FastAPI
from PIL import Image

from rsnet.inference.classifier import SwitchableClassifier
from rsnet.serving import server as serve
from rsnet.serving.config import ServerConfig


@contextmanager
def running(app: FastAPI) -> Iterator[httpx.Client]:
    """A client of the application, while it is served."""
    server, listener = serve.make_server(app), serve.bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        url = "http://{}:{}".format(*listener.getsockname())
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serving(
    classifier: SwitchableClassifier, is_loopback: bool = True, **options: object
) -> Iterator[httpx.Client]:
    """As `python -m rsnet serve` with these options; the client knows the `service`."""
    given = ServerConfig(**options)
    service = serve.make_service(classifier, given)
    with running(serve.make_app(service, given, is_loopback)) as client:
        client.service = service
        yield client


def connect(client: httpx.Client) -> socket.socket:
    """A bare connection to the server of a client."""
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)


def photo(seed: int, width: int = 60, height: int = 50) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


class Gate:
    """A network that computes only when it may, and what it was asked for: (size, images) by batch."""

    def __init__(self, classifier: SwitchableClassifier) -> None:
        self.batches: list[tuple[int, list[np.ndarray]]] = []
        self.is_open, self.entered = threading.Event(), threading.Event()
        self._predict = classifier.predict

    def __call__(self, pixels, size):
        self.batches.append((size, [p.numpy() for p in pixels]))
        self.entered.set()
        assert self.is_open.wait(30)
        return self._predict(pixels, size)


def until(holds) -> None:
    while not holds():
        time.sleep(0.005)


def request_head(length: int) -> bytes:
    return (
        f"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()
    )


def colours(gate: Gate) -> list[int]:
    """Of what was computed; images of one colour have only this value."""
    return [int(pixels.max()) for _, images in gate.batches for pixels in images]


def plain(colour: int) -> bytes:
    return encoded(Image.new("RGB", (40, 40), (colour,) * 3))


PHOTO = encoded(photo(0))

"""`rsnet serve`: a trained network behind a web page and a JSON interface."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from dataclasses import dataclass

from pipelines.utils.errors import UsageError
from pipelines.utils.output import say
from rsnet.cli.classifier import ClassifierOptions, LatencyOptions, load_classifier, say_source
from rsnet.serving.config import ServerConfig


@dataclass(frozen=True, kw_only=True)
class Options(LatencyOptions, ServerConfig, ClassifierOptions):
    """Serve a trained network: a web page that compares its sizes, and JSON. Ctrl-C ends it.

    Exit code: 0 if it was stopped, 1 if the port is taken, 2 for a mistake in the command.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 accepts this machine only, 0.0.0.0 everyone who can reach it."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    top: int = 5
    """Classes to name."""


def run(options: Options) -> int:
    _require_packages()
    from PIL import Image

    from rsnet.serving import server

    _require_valid(options, int(Image.MAX_IMAGE_PIXELS or 0) / 1e6)
    with server.bind(options.host, options.port) as listener:
        classifier, source = load_classifier(options, options.top)
        say_source(source, sys.stderr)  # stdout is for the address
        service = server.make_service(classifier, options)
        app = server.make_app(service, options, server.is_loopback(listener))
        # As an error it is caught, and answered; as a warning it would end up in the server's output.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        sizes = " ".join(map(str, classifier.sizes))
        line = f"{options.source}, sizes {sizes}: {server.url_of(listener)} (Ctrl-C ends)"
        server.serve_forever(app, listener, lambda: say(line))
    return 0


# Beyond, Python's clocks and threads overflow.
MOST = {"timeout": 1e6, "max_megabytes": 1e6, "max_megapixels": 1e6, "deadline_ms": 1e9,
        "batch_wait_ms": 1e9}  # fmt: skip
MAX_REQUESTS = 10**6


def _require_valid(options: Options, most_megapixels: float) -> None:
    """Raise UsageError for an option out of range. most_megapixels: the largest image that PIL opens."""
    for name, most in MOST.items():
        value = getattr(options, name)
        lowest = 0 if name == "batch_wait_ms" else 1e-3
        if value is not None and not lowest <= value <= most:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: a positive number is needed, {most:g} at most"
            )
    if options.max_megapixels > most_megapixels:
        raise UsageError(
            f"--max-megapixels {options.max_megapixels}: PIL takes {most_megapixels:.0f} at most"
        )
    for name in options.allow_host:
        if not re.fullmatch(r"\*|(\*\.)?[\w.-]+", name):
            raise UsageError(
                f"--allow-host {name}: give a name alone, as photos.example or *.example"
            )
    if not 1 <= options.queue <= MAX_REQUESTS:
        raise UsageError(f"--queue {options.queue}: at least 1 is needed, {MAX_REQUESTS} at most")
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port {options.port}: a number from 0 to 65535 is needed")


def _require_packages() -> None:
    for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UsageError(
                f'{name} is not installed: pip install "rsnet-trainer[serve]"'
            ) from None

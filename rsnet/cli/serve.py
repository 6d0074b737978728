"""`rsnet serve`: a release behind a web page and a JSON interface."""

from __future__ import annotations

import importlib
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from tyro.conf import Positional, arg

from pipelines.utils.errors import UsageError
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.serving.server import (
    ServerConfig,
    bind,
    is_loopback,
    make_app,
    make_service,
    serve_forever,
)


@dataclass(frozen=True, kw_only=True)
class Options(ServerConfig):
    """Serve a release: a web page that compares its sizes, and JSON. Ctrl-C ends it.

    Exit code: 0 if it was stopped, 1 if the port is taken, 2 for a mistake in the command.
    """

    release: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Folder that `python -m rsnet release` wrote."""

    host: str = "127.0.0.1"
    """Address to listen at: this machine alone. 0.0.0.0 lets in everyone who can reach it."""

    port: int = 8000
    """0 takes a free one."""

    device: str | None = None
    """cpu, cuda, cuda:1, ... Unset: the GPU if there is one."""

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
        app = make_app(make_service(classifier, options), options, is_loopback(listener))
        # As an error it is caught, and answered; as a warning it would end up in the server's output.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        serve_forever(
            app, listener, f"{options.release}, sizes {' '.join(map(str, classifier.sizes))}"
        )
    return 0


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

"""The server's routes and security headers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.utils.text import encodable
from rsnet.inference.cascade import Prediction
from rsnet.serving.metrics import CountRequests
from rsnet.serving.service import Service

PAGE = Path(__file__).with_name("page")

# Nothing but our own files, and the visitor's image, which is a blob; in no other site's frame.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Choice(BaseModel):
    """Query of /classify: one at most."""

    model_config = ConfigDict(extra="forbid")

    size: int | None = None
    confidence: float | None = None
    budget_ms: float | None = None


def make_app(service: Service, info: dict[str, Any], hosts: Sequence[str] | None) -> FastAPI:
    """Make the application. info: the answer of GET /info. hosts: accepted Host headers; None for any."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    # The generated documentation would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_exception_handler(RequestValidationError, _in_one_line)
    if hosts is not None:  # else a foreign page could get here under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(_Headers)
    app.add_middleware(CountRequests, metrics=service.metrics)

    @app.post("/classify", dependencies=[Depends(_refuse_other_sites)])
    async def classify(request: Request, choice: Annotated[Choice, Query()]) -> dict[str, Any]:
        found = await service.classify(request, choice.size, choice.confidence, choice.budget_ms)
        return {**_json(found[-1]), "ms": sum(one.ms for one in found)}

    @app.post("/compare", dependencies=[Depends(_refuse_other_sites)])
    async def compare(request: Request) -> list[dict[str, Any]]:
        return [_json(one) for one in await service.compare(request)]

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not service.batches.is_alive:
            raise HTTPException(503, "the network's thread has ended")
        return {"status": "ok"}

    @app.get("/info")
    async def about() -> dict[str, Any]:
        return info

    @app.get("/metrics")
    async def metrics() -> Response:
        return service.metrics.response()

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


class _Headers:
    """Adds HEADERS to every answer. Starlette's BaseHTTPMiddleware would hide that a client disconnects."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _refuse_other_sites(request: Request) -> None:
    """Refuse requests from other sites' pages, which could make visitors' computers work for them."""
    site, origin = (request.headers.get(name) for name in ("sec-fetch-site", "origin"))
    if (
        site is None and origin is not None
    ):  # browsers send the first by https and to loopback alone
        is_own = origin.partition("://")[2] == request.headers.get("host")
        site = "same-origin" if is_own else "cross-site"
    if site not in (None, "none", "same-origin"):
        raise HTTPException(403, "pages of other sites may not send images")


async def _in_one_line(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, 422)


def _json(prediction: Prediction) -> dict[str, Any]:
    """Return what `rsnet predict --json` prints. Names may hold what UTF-8 has no code for."""
    names = map(encodable, prediction.classes)
    return replace(prediction, classes=tuple(names)).to_dict()

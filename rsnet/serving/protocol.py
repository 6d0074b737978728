"""HTTP connections that end if nothing comes of them."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# Seconds for the head of a request to be there, from the connection or the answer before.
IDLE_S = 10.0


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

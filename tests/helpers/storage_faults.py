"""Faults that a test puts between a client and a server of object storage."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass
class Fault:
    """What happens to the requests of a kind, so many times.

    method, key: a request's, of which the key ends so. status: answered in place of the object's, such as
    503. delay: seconds before the answer. cut: bytes of the body that are sent before the connection ends.
    """

    method: str = "GET"
    key: str = ""
    status: int | None = None
    delay: float = 0
    cut: int | None = None
    times: int = 1


class Faults(list[Fault]):
    """Those that are still to happen."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def take(self, method: str, path: str) -> Fault | None:
        """The one that happens to a request, if any."""
        with self._lock:
            for fault in self:
                if fault.times and method == fault.method and path.endswith(fault.key):
                    fault.times -= 1
                    return fault
        return None

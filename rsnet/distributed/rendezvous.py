"""Rendezvous of the processes, also after torchrun has restarted them."""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipelines.utils.errors import RunError, UsageError, first_line

# The store is looked at so often; rank 0 waits so long for an answer before it asks again.
INTERVAL_S, PATIENCE_S = 0.05, 2.0


def open_store(rank: int, world: int, timeout: timedelta) -> Any:
    """Return the store of this attempt, which all ranks enter. Its server is torchrun's, or else rank 0's.

    torchrun keeps one store over all attempts (seen with torch 2.15), with the addresses of the dead; its
    count of restarts differs between machines. So rank 0 names the attempt, with the processes that it
    has seen: those that are among them agree, and a process that died cannot.

    Raises RunError if they do not come together in time.
    """
    store = connect(timeout, hosts=rank == 0)
    deadline = time.monotonic() + timeout.total_seconds()
    me = uuid.uuid4().hex
    store.set(f"join/{rank}", me)
    while time.monotonic() < deadline:
        attempt = _ask(store, world) if rank == 0 else _answer(store, me)
        if attempt:
            return dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
    raise RunError(
        f"rank {rank} waited {timeout.total_seconds():.0f} s for the other processes: do {world} run, and "
        f"do they reach {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}?"
    )


def connect(timeout: timedelta, hosts: bool = False) -> Any:
    """Return a new connection to the server of the store, which rank 0 `hosts` unless torchrun does.

    Raises UsageError if there is no such place, RunError if nothing answers there in time.
    """
    host, port = rendezvous_address()
    is_master = hosts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if is_master:
        _require_free(port)
    try:
        return dist.TCPStore(host, port, is_master=is_master, timeout=timeout)  # type: ignore[attr-defined]
    except dist.DistError as error:
        raise RunError(
            f"nothing answers at MASTER_ADDR {host}, MASTER_PORT {port} ({first_line(error)}): "
            "does the process with RANK 0 run there?"
        ) from error


def rendezvous_address() -> tuple[str, int]:
    """Return MASTER_ADDR and MASTER_PORT. Raises UsageError for a host or port that is none."""
    host, port = require_variable("MASTER_ADDR"), integer_variable("MASTER_PORT", range(1, 65536))
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise UsageError(f"MASTER_ADDR {host}: {reason}") from None
    return host, port


def require_variable(name: str) -> str:
    """Return an environment variable of torchrun's. Raises UsageError if it is not set."""
    if value := os.environ.get(name):
        return value
    raise UsageError(
        f"{name} is not set, although WORLD_SIZE is; torchrun sets all that is needed. To train "
        "with one process alone, unset WORLD_SIZE"
    )


def integer_variable(name: str, valid: range) -> int:
    """Return an environment variable of torchrun's, a number. Raises UsageError unless it is a valid one."""
    text = require_variable(name)
    if re.fullmatch(r"[0-9]{1,9}", text) is None or int(text) not in valid:
        raise UsageError(
            f"{name} {text}: a number from {valid.start} to {valid.stop - 1} is needed"
        )
    return int(text)


def _require_free(port: int) -> None:
    """Raise UsageError if no server can be opened at a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UsageError(
                f"MASTER_PORT {port}: {error.strerror}; give another one to all processes"
            ) from None


def _ask(store: Any, world: int) -> str:
    """Name an attempt of those that joined, on rank 0; return "" if they do not all answer."""
    seen = [_get(store, f"join/{r}") for r in range(world)]
    if not all(seen):
        time.sleep(INTERVAL_S)
        return ""
    attempt = uuid.uuid4().hex
    store.set("attempt", " ".join([attempt, *seen]))
    answers = [f"{attempt}/{r}" for r in range(1, world)]
    until = time.monotonic() + PATIENCE_S
    while answers and not store.check(answers):
        if time.monotonic() > until:
            return ""
        time.sleep(INTERVAL_S)
    store.set(f"{attempt}/go", "")
    return attempt


def _answer(store: Any, me: str) -> str:
    """Agree, on another rank, to an attempt that has this process; return "" if it does not begin."""
    attempt, *seen = _get(store, "attempt").split() or [""]
    if me not in seen:
        time.sleep(INTERVAL_S)
        return ""
    store.set(f"{attempt}/{seen.index(me)}", "")
    until = time.monotonic() + 2 * PATIENCE_S
    while not store.check([f"{attempt}/go"]):
        if time.monotonic() > until or not _get(store, "attempt").startswith(attempt):
            return ""
        time.sleep(INTERVAL_S)
    return attempt


def _get(store: Any, key: str) -> str:
    """Return what is under `key`; "" if nothing is."""
    return store.get(key).decode() if store.check([key]) else ""

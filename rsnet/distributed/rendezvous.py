"""Rendezvous of the processes, also after torchrun has restarted them."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipelines.utils.errors import RunError

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
    """Return a new connection to the server of the store."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=hosts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timeout,
    )


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

"""Checks that all processes have the same options, files and data before they train together."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.batch import Loaders
from pipelines.utils.errors import UsageError
from pipelines.utils.text import distinct
from rsnet.distributed import process_group as distributed


def require_same(what: str, facts_here: Callable[[], Mapping[str, Any]]) -> None:
    """Compare the facts of all ranks, which call it together; one process alone computes none.

    Raises UsageError on all of them, which names the first rank with a difference and that difference.
    """
    if distributed.world_size() == 1:
        return
    own = socket.gethostname(), distributed.run_on_all(facts_here)
    (host, first), *others = distributed.all_gather_object(own)
    for rank, (other_host, other) in enumerate(others, start=1):
        for name in first:
            if other[name] != first[name]:
                there, here = _first_difference(other[name], first[name])
                raise UsageError(
                    f"rank {rank} (on {other_host}) has other {what} than rank 0 (on {host}): "
                    f"{name} {there} there and {here} here; give all nodes the same"
                )


def require_on_rank_0(path: Path) -> None:
    """Raise UsageError, on all ranks, if `path` exists on another rank's machine but not on rank 0's.

    path: what rank 0 resumes from, where it is. torchrun may place rank 0 on another machine when it
    restarts, and training would silently start from scratch.
    """
    is_here = distributed.run_on_all(lambda: path.exists())
    (host, has), *others = distributed.all_gather_object((socket.gethostname(), is_here))
    for rank, (other_host, other_has) in enumerate(others, start=1):
        if other_has and not has:
            raise UsageError(
                f"{path} is on the disk of rank {rank} (on {other_host}), but not of rank 0 (on {host}), "
                "which resumes and saves: copy the run there, give a folder that all share, or, to begin "
                "anew, another --output"
            )


def data_facts(loaders: Loaders) -> dict[str, Any]:
    """Return what ranks must read alike, the plainest fact first."""
    facts: dict[str, Any] = {"classes": loaders.classes}
    for split, loader in (("train", loaders.train), ("val", loaders.val)):
        if loader is not None:
            state = loader.state_dict()
            facts[f"number of {split} images"] = state["samples"]
            facts[f"fingerprint of the {split} images"] = state["data"]
            facts[f"order of the {split} images"] = state["order"]
            weights = loader.sample_weights
            digest = None if weights is None else hashlib.sha256(weights.tobytes()).hexdigest()
            facts[f"weights of the {split} images"] = digest
    return facts


def _first_difference(there: Any, here: Any) -> tuple[str, str]:
    """Return two values as text; of lists the first items that differ."""
    if not (isinstance(there, Sequence) and isinstance(here, Sequence)) or isinstance(there, str):
        return _shown(there), _shown(here)
    pairs = zip(there, here, strict=False)
    number = next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), None)
    if number is None:
        return str(len(there)), str(len(here))
    return f"(number {number}) {_shown(there[number])}", _shown(here[number])


def _shown(value: Any) -> str:
    text = distinct(str(value))
    return text if len(text) < 60 else f"{text[:12]}..."

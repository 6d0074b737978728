"""Checkpoints for the authors' code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsnet.checkpoint import io
from rsnet.checkpoint.authors_pytorch import to_original
from rsnet.checkpoint.checkpoint import Checkpoint


def export_original(checkpoint: Checkpoint, output: str | Path) -> dict[str, Any]:
    """Write a checkpoint as a file for the authors' code; return the state of the optimizer in it.

    Raises UsageError if the authors' code has no such network.
    """
    content = to_original(checkpoint)
    io.write(Path(output), content)
    return content["optimizer"]  # type: ignore[no-any-return]

"""Checkpoints for the authors' code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint.authors_pytorch import to_original


def export_original(source: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the checkpoint `source` as a file for the authors' code, and return its network's description.

    Raises UsageError if there is no checkpoint, or the authors' code has no such network; DataError if the
    file is damaged.
    """
    content = checkpoint.load(Path(source))
    checkpoint.write(Path(output), to_original(content))
    network: dict[str, Any] = content["network"]
    return network

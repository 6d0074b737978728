"""Checkpoints for the authors' code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsnet.checkpoint import io
from rsnet.checkpoint.authors_pytorch import to_original
from rsnet.config.model_config import ModelConfig


def export_original(source: str | Path, output: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Write the checkpoint `source` as a file for the authors' code; return what its network is, and the
    state of the optimizer that was written.

    Raises UsageError if there is no checkpoint, or the authors' code has no such network; DataError if the
    file is damaged.
    """
    checkpoint = io.load(Path(source))
    content = to_original(checkpoint)
    io.write(Path(output), content)
    return checkpoint.network, content["optimizer"]

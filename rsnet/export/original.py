"""Checkpoints for the authors' code."""

from __future__ import annotations

from pathlib import Path

from rsnet.checkpoint import io
from rsnet.checkpoint.authors_pytorch import to_original
from rsnet.config.model_config import ModelConfig


def export_original(source: str | Path, output: str | Path) -> ModelConfig:
    """Write the checkpoint `source` as a file for the authors' code, and return what its network is.

    Raises UsageError if there is no checkpoint, or the authors' code has no such network; DataError if the
    file is damaged.
    """
    checkpoint = io.load(Path(source))
    io.write(Path(output), to_original(checkpoint))
    return checkpoint.network

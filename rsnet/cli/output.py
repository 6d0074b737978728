"""Checks of output paths before minutes or hours of work."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.utils.errors import UsageError


def require_new(flag: str, path: Path) -> None:
    """Raise UsageError if a file or folder that an option names is there, or cannot be made."""
    if path.exists() or path.is_symlink():
        raise UsageError(f"{flag}: {path} exists; give another name")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UsageError(f"{flag}: cannot write into {above}")

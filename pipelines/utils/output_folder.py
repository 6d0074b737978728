"""The folder of --output: made, and large enough for what is to be written."""

from __future__ import annotations

from pathlib import Path

from pipelines.utils.atomic_io import free_space
from pipelines.utils.errors import RunError, UsageError
from pipelines.utils.progress import format_bytes


def make_folder(output: Path) -> None:
    """Make the folder unless it is there. Raises UsageError if it cannot be made."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: cannot make {output}: {error.strerror}") from None


def require_space(output: Path, size: float) -> None:
    """Raise RunError if so many bytes do not fit on the folder's disk."""
    if size > (free := free_space(output)):
        raise RunError(
            f"--output: about {format_bytes(size)} are to be written, {output} has {format_bytes(free)} free"
        )

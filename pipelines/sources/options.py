"""Where the validation images are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.utils.errors import UsageError


@dataclass(frozen=True)
class SplitOptions:
    """Where the validation images are, if not in a split of --data's own."""

    val_data: str | Path | None = None
    """A folder, table or shards of their own."""

    val_fraction: float | None = None
    """Share of the training images, by a hash of their names."""

    def __post_init__(self) -> None:
        if self.val_fraction is None:
            return
        if self.val_data is not None:
            raise UsageError("--val-fraction: not with --val-data, which has the validation images")
        if not 0 < self.val_fraction < 1:
            raise UsageError(f"--val-fraction {self.val_fraction:g}: a share above 0 and below 1")


NO_OPTIONS = SplitOptions()

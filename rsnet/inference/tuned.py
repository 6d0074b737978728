"""What `python -m rsnet tune` leaves beside a release, in tuned.json: temperatures, and a cascade."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from pipelines.utils.atomic_io import atomic_write_json
from pipelines.utils.errors import DataError, UsageError
from rsnet.inference.cascade import Cascade, CascadeStage

NAME, FORMAT = "tuned.json", 1

# Temperatures far from those that are fitted, which are from 1/20 to 20, make NaN of logits.
LEAST = 1e-3


@dataclass(frozen=True)
class Tuned:
    """temperatures: by size, what logits are divided by. ladder: the cascade; the smallest size first."""

    temperatures: dict[int, float]
    ladder: Cascade


def write(folder: Path, sha256: str, tuned: Tuned, notes: Mapping[str, Any]) -> None:
    """Write tuned.json in place of an earlier one. notes: what else it is to say. Raises OSError."""
    content = {
        "format": FORMAT,
        "sha256": sha256,
        "temperatures": {str(size): value for size, value in tuned.temperatures.items()},
        "cascade": [step._asdict() for step in tuned.ladder],
    }
    atomic_write_json(folder / NAME, content | dict(notes))


def read(folder: Path, sha256: str, sizes: Sequence[int]) -> Tuned:
    """What was tuned of the release in `folder`, whose weights have this SHA-256.

    Raises UsageError if nothing was; DataError, in one line, if the file is damaged or of other weights.
    """
    path, advice = folder / NAME, "run `python -m rsnet tune` again"
    if not path.is_file():
        raise UsageError(f"there is no {path}; `python -m rsnet tune` writes it")
    try:
        content = json.loads(path.read_bytes())
        is_known, other = content["format"] == FORMAT, content["sha256"] != sha256
        tuned = Tuned(
            {size: float(content["temperatures"][str(size)]) for size in sizes},
            tuple(
                CascadeStage(index(s["size"]), float(s["threshold"])) for s in content["cascade"]
            ),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} is damaged; {advice}") from error
    if other:
        raise DataError(f"{path} is of other weights; {advice}")
    if not (is_known and _makes_sense(tuned, sizes)):
        raise DataError(f"{path} is damaged, or of another version; {advice}")
    return tuned


def _makes_sense(tuned: Tuned, sizes: Sequence[int]) -> bool:
    """NaN is in no range."""
    climbed = [step.size for step in tuned.ladder]
    return (
        len(climbed) > 0
        and set(climbed) <= set(sizes)
        and climbed == sorted(set(climbed))
        and all(0 <= step.threshold <= 1 for step in tuned.ladder)
        and all(LEAST <= value <= 1 / LEAST for value in tuned.temperatures.values())
    )

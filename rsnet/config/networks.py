"""The networks that `--arch` takes: their sizes, costs and published weights. Imports no torch.

networks.json, which `scripts/networks.py` writes, is of the ordinary networks with 1000 classes.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.utils.errors import UsageError
from rsnet.config.model_config import AUTHORS_NAMES, PREFIX

FILE = Path(__file__).with_name("networks.json")

# Pixels a side of the images that costs are given for.
PIXELS = 224


@dataclass(frozen=True)
class Network:
    """A network by its name, with its number of parameters, and GMACs of an image of 224 pixels.

    gmacs: None where the network takes no such image. weights: names of its library's weights.
    """

    name: str
    parameters: int
    gmacs: float | None
    weights: tuple[str, ...]


def torchvision_networks() -> list[Network]:
    """Return torchvision's networks, by name."""
    rows = json.loads(FILE.read_text())
    return [Network(name, **row | {"weights": tuple(row["weights"])}) for name, row in rows.items()]


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that one of the patterns fits, all without any.

    A pattern without * and ? fits what it is a part of: of the name, or of torchvision's spelling of it.

    Raises UsageError if nothing fits.
    """
    known = list(names)
    spelled = {theirs: name for name, theirs in AUTHORS_NAMES.items()}

    def fits(name: str, pattern: str) -> bool:
        bare = name.removeprefix(PREFIX)
        whole = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
        spellings = {name, bare, spelled.get(bare, bare), PREFIX + spelled.get(bare, bare)}
        return any(fnmatch.fnmatchcase(one, whole) for one in spellings)

    found = [n for n in known if not patterns or any(fits(n, p.lower()) for p in patterns)]
    if not found:
        bare_names = [name.removeprefix(PREFIX) for name in known]
        near = difflib.get_close_matches(patterns[0].lower(), bare_names, n=3, cutoff=0.5)
        advice = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"{' '.join(patterns)}: there is no such network{advice}")
    return found

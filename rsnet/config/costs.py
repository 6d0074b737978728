"""GMACs per image in files, by size and of the ensemble."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any


def require_gmacs(content: MutableMapping[str, Any]) -> None:
    """Give `content`, of a parsed file, its "gmacs" in place of the "gflops" that files had before.

    A GFLOP was an addition or a multiplication there, so that a multiply-accumulate counted twice. Values
    that are no numbers stay, for a check to name them.
    """
    if "gmacs" not in content and isinstance(gflops := content.get("gflops"), dict):
        del content["gflops"]
        is_number = {name: type(value) in (int, float) for name, value in gflops.items()}
        content["gmacs"] = {n: v / 2 if is_number[n] else v for n, v in gflops.items()}

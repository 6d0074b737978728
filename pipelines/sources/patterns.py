"""Patterns of shards: `*`, ranges of numbers, and the names of both splits."""

from __future__ import annotations

import re

from pipelines.utils.errors import UsageError


def is_pattern(text: str) -> bool:
    """Return whether a path or URL is meant for shards."""
    return text.endswith(".tar") or bool(re.search(r"[*?{]", text))


def of_split(pattern: str, split: str) -> str:
    """Return a pattern with the name of a split in place of both, `{TRAIN,VAL}`, if it has them."""
    found = _BOTH.search(pattern)
    if found is None:
        return pattern
    name = found[1] if split == "train" else found[2]
    return pattern[: found.start()] + name + pattern[found.end() :]


def has_splits(pattern: str) -> bool:
    """Return whether a pattern names both splits."""
    return _BOTH.search(pattern) is not None


def expanded(pattern: str) -> list[str]:
    """Return a pattern with each number of its ranges, as of `{000000..000146}`, in their order."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + MAX_SHARDS:
        raise UsageError(f"{pattern}: {found[0]} is no range of up to {MAX_SHARDS} numbers")
    rest = expanded(pattern[found.end() :])
    width = len(found[1])
    return [
        f"{pattern[: found.start()]}{i:0{width}}{tail}"
        for i in range(first, last + 1)
        for tail in rest
    ]


MAX_SHARDS = 10**6
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # as webdataset writes them
_PART = r"((?:[^{},]|\{[^{},]*\})*)"  # it may have a range
_BOTH = re.compile(rf"\{{{_PART},{_PART}\}}")

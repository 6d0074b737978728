"""The sizes that a step trains, by epoch: `--size-schedule EPOCHS:SIZE[,SIZE...] ...`. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipelines.utils.errors import UsageError

WITHOUT = ("0:all",)  # no schedule: all sizes from the first epoch on


class Phase(NamedTuple):
    """Epochs in which the same sizes are trained.

    start: epochs before them. sizes: of --sizes, the largest first.
    """

    start: int
    sizes: tuple[int, ...]


def is_schedule(words: Sequence[str]) -> bool:
    """Return whether each word is EPOCHS:SIZE[,SIZE...] or EPOCHS:all."""
    word = r"[0-9]{1,7}:(all|[0-9]{1,4}(,[0-9]{1,4})*)"
    return bool(words) and all(re.fullmatch(word, w, re.ASCII) for w in words)


def phases_of(words: Sequence[str], sizes: Sequence[int]) -> tuple[Phase, ...]:
    """Return the phases of a schedule that has passed `is_schedule` and `require_valid`."""
    phases = []
    for word in words:
        start, _, names = word.partition(":")
        chosen = set(sizes) if names == "all" else set(map(int, names.split(",")))
        phases.append(Phase(int(start), tuple(sorted(chosen, reverse=True))))
    return tuple(phases)


def as_words(phases: Sequence[Phase], sizes: Sequence[int]) -> tuple[str, ...]:
    """Return phases as they are typed."""
    return tuple(
        f"{start}:{'all' if len(chosen) == len(sizes) else ','.join(map(str, chosen))}"
        for start, chosen in phases
    )


def require_valid(words: Sequence[str], sizes: Sequence[int], epochs: int) -> None:
    """Raise UsageError for phases out of order or that never come, sizes that are not there, or that are not
    trained in the end, when the weights that they share still change."""
    phases, typed = phases_of(words, sizes), f"--size-schedule {' '.join(words)}"
    starts = [phase.start for phase in phases]
    known = " ".join(map(str, sizes))
    if starts[0] != 0:
        if starts[0] in sizes and starts[0] >= epochs:  # SIZE:EPOCHS
            raise UsageError(
                f"{typed}: {starts[0]} is a size; give epochs first, as in 0:{starts[0]}"
            )
        raise UsageError(
            f"{typed}: say what is trained from the start, as in 0:{min(sizes)} {words[0]}"
        )
    if starts != sorted(set(starts)):
        raise UsageError(f"{typed}: each part must begin after more epochs than the one before")
    for unknown in (s for phase in phases for s in phase.sizes if s not in sizes):
        raise UsageError(f"{typed}: {unknown} is none of --sizes {known}")
    if missing := [str(s) for s in sizes if s not in phases[-1].sizes]:
        raise UsageError(
            f"{typed}: ends without {' '.join(missing)}; train all sizes in the last epochs, as in "
            f"{min(starts[-1] + 1, 9999999)}:all"
        )
    if starts[-1] >= epochs:
        raise UsageError(
            f"{typed}: --epochs {epochs} end before the last part, which is to train all sizes"
        )


def sizes_in(phases: Sequence[Phase], epoch: int) -> tuple[int, ...]:
    """Return the sizes that an epoch, counted from 0, trains."""
    return max(phase for phase in phases if phase.start <= epoch).sizes


def step_sets(phases: Sequence[Phase], k: int) -> int:
    """Return how many sets of sizes steps train: of each phase the largest, and k - 1 others of it."""
    counts = [len(sizes) for sizes in {phase.sizes for phase in phases}]
    return sum(math.comb(count - 1, min(k, count) - 1) for count in counts)


def step_cost(costs: Mapping[int, float], sizes: Sequence[int], k: int) -> float:
    """Return the mean cost of a step that trains the largest of `sizes` and k - 1 others, drawn at random.

    costs: of each size.
    """
    largest, *others = (costs[size] for size in sorted(sizes, reverse=True))
    drawn = min(k, len(sizes)) - 1
    return largest + (drawn / len(others) * sum(others) if others else 0.0)


def mean_cost(costs: Mapping[int, float], phases: Sequence[Phase], k: int, epochs: int) -> float:
    """Return the mean cost of a step over a training of so many epochs."""
    ends = [phase.start for phase in phases[1:]] + [epochs]
    parts = (
        (end - phase.start) * step_cost(costs, phase.sizes, k)
        for phase, end in zip(phases, ends, strict=True)
    )
    return sum(parts) / epochs

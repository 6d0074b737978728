"""Latency of each size on a device, measured there and kept beside the release's files."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipelines.utils.atomic_io import atomic_write_json
from pipelines.utils.errors import DataError, UsageError
from pipelines.utils.schema import parsing

# By size: {"median": ms, "p95": ms} of a forward of a whole batch.
Table = dict[int, dict[str, float]]

Key = TypeVar("Key")

WARM_UP, REPEATS = 5, 40

# Largest p95 over the median of a device that has nothing else to do; programs that take turns on it make it
# two and more.
STEADY = 1.5

# py-cpuinfo starts processes, and took 1.9 s to say the same.
CPU_INFO = Path("/proc/cpuinfo")


class OverBudgetError(UsageError):
    """A budget that no size fits into."""


def device_name(device: torch.device) -> str:
    """Return a name such as `NVIDIA H100` or `cpu AMD EPYC 9654`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        model = re.search(r"^model name\s*: *(.+)", CPU_INFO.read_text(), re.MULTILINE)
        return f"{device.type} {model[1].strip()}" if model else device.type
    return device.type


def measure(forward: Callable[[int], object], sizes: tuple[int, ...]) -> Table:
    """Time `forward(size)`, which returns when its result is on the host.

    Returns, by size, {"median": ms, "p95": ms}.
    """
    return {
        size: {"median": percentile(t, 50), "p95": percentile(t, 95)}
        for size, t in sample(forward, sizes, REPEATS).items()
    }


def sample(
    forward: Callable[[Key], object], sizes: tuple[Key, ...], repeats: int
) -> dict[Key, list[float]]:
    """Return, by size, milliseconds of each of the `repeats` forwards that follow the warm-up.

    sizes: or whatever else says what `forward` computes. They take turns, so that what else the machine does
    meanwhile falls on all of them.
    """
    times: dict[Key, list[float]] = {size: [] for size in sizes}
    for turn in range(WARM_UP + repeats):
        for size in sizes:
            start = time.perf_counter()
            forward(size)
            if turn >= WARM_UP:
                times[size].append(1000 * (time.perf_counter() - start))
    return times


def unsteady(table: Table) -> str:
    """Return what shows that the device was busy with something else meanwhile; "" if nothing does."""
    spread, size = max((ms["p95"] / ms["median"], size) for size, ms in table.items())
    if spread <= STEADY:
        return ""
    return f"at size {size}, one of twenty batches took {spread:.1f} times as long as usual"


def percentile(times: list[float], percent: int) -> float:
    """Return a percentile, from 1 to 99, by linear interpolation."""
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


def file_name(device: str) -> str:
    """Return the name of the file with a release's table for a device. device: its name."""
    return f"latency-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-')}.json"


def save(path: str | Path, conditions: Mapping[str, Any], table: Table) -> None:
    """Write a table. conditions: those it was measured in, such as the batch size. Raises OSError."""
    atomic_write_json(
        Path(path), {"conditions": dict(conditions), "ms": {str(s): t for s, t in table.items()}}
    )


def load(path: str | Path, conditions: Mapping[str, Any], sizes: tuple[int, ...]) -> Table | None:
    """Read a table; return None if there is none, or it was measured in other conditions, or while the
    device was busy.

    Raises DataError, in one line, for a file that is no such table.
    """
    path = Path(path)
    if not path.is_file():
        return None
    remedy = "remove it to have the sizes measured anew"
    with parsing(path, remedy):
        content = json.loads(path.read_bytes())
        if content["conditions"] != conditions:
            return None
        table = {s: {k: float(content["ms"][str(s)][k]) for k in ("median", "p95")} for s in sizes}
    if not all(0 < ms < float("inf") for times in table.values() for ms in times.values()):
        raise DataError(f"{path} has a latency that is none; remove it")
    return None if unsteady(table) else table


def best_size(
    table: Table, budget_ms: float, accuracy: Mapping[str, Mapping[str, float]] | None
) -> int:
    """Return the most accurate size, or the largest if accuracies are not known, whose p95 fits.

    Raises OverBudgetError, which says what the fastest takes, if none does.
    """
    fitting = [size for size, ms in table.items() if ms["p95"] <= budget_ms]
    if not fitting:
        size = min(table, key=lambda s: table[s]["p95"])
        fastest = f"size {size} takes {table[size]['p95']:.2f} ms in 95 of 100 batches"
        raise OverBudgetError(f"no size fits into {budget_ms} ms: {fastest}")
    if accuracy is None:
        return max(fitting)
    return max(fitting, key=lambda s: (accuracy[str(s)]["top1"], -table[s]["p95"]))


def choices(
    table: Table, accuracy: Mapping[str, Mapping[str, float]] | None
) -> list[tuple[int, float]]:
    """Return the sizes that some budget buys, the most accurate first, each with its least budget in ms."""
    budgets = sorted((ms["p95"] for ms in table.values()), reverse=True)
    least = {best_size(table, budget, accuracy): budget for budget in budgets}
    return list(least.items())

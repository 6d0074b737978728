"""Which kernels of a trace take the GPU's time, and where it has nothing to do.

    python -m benchmarks.gpu.trace runs/parallel_resnet50-imagenet/profile/trace.json.gz

The trace is one of `rsnet train --profile`. Prints the kernels with the largest total time, then the longest
gaps, in which no kernel runs on any stream, with the kernels around them.
"""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from tyro.conf import Positional, arg

from benchmarks.options import command
from pipelines.utils.errors import DataError
from pipelines.utils.schema import parsing
from pipelines.utils.tables import text_table

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
WIDTH = 80  # of a kernel's name, which may be a screen long


@dataclass(frozen=True)
class Options:
    trace: Positional[Annotated[Path, arg(metavar="FILE")]]
    """trace.json.gz of a profile."""

    most: int = 10
    """Kernels, and gaps, that are listed."""


class Kernel(NamedTuple):
    """One that ran, from `start` for `length` microseconds."""

    start: float
    length: float
    name: str


class Gap(NamedTuple):
    length: float
    before: str
    after: str


def read(path: Path) -> list[Kernel]:
    """Return the kernels of a trace, by their start. Raises DataError if it has none, or is damaged."""
    with parsing(path, "give the trace.json.gz of a profile"):
        try:
            with gzip.open(path, "rt") as file:
                events = json.load(file)["traceEvents"]
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:  # the first without a path
            raise ValueError(error) from error
        found = [Kernel(e["ts"], e["dur"], e["name"]) for e in events if e.get("cat") in ON_GPU]
    if not found:
        raise DataError(f"{path}: no kernel of a GPU is in it: it was traced on a CPU")
    return sorted(found)


def gaps_of(kernels: Sequence[Kernel]) -> list[Gap]:
    """Return when no kernel runs, the longest first."""
    gaps = []
    last, end = kernels[0], kernels[0].start + kernels[0].length
    for kernel in kernels[1:]:
        if kernel.start > end:
            gaps.append(Gap(kernel.start - end, last.name, kernel.name))
        if kernel.start + kernel.length > end:
            last, end = kernel, kernel.start + kernel.length
    return sorted(gaps, reverse=True)


def longest(kernels: Sequence[Kernel]) -> list[tuple[str, int, float]]:
    """Return name, calls and microseconds of each kernel, that with the most time first."""
    lengths: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        lengths[kernel.name].append(kernel.length)
    found = [(name, len(each), sum(each)) for name, each in lengths.items()]
    return sorted(found, key=lambda row: -row[2])


def run(o: Options) -> int:
    kernels = read(o.trace)
    total = sum(kernel.length for kernel in kernels)
    rows = [
        [f"{100 * us / total:.1f}", f"{us / 1000:.2f}", str(calls), name[:WIDTH]]
        for name, calls, us in longest(kernels)[: o.most]
    ]
    print(text_table(["%", "ms", "calls", "kernel"], rows, left=(3,)))
    gaps = gaps_of(kernels)
    rows = [[f"{g.length:.0f}", g.before[:WIDTH], g.after[:WIDTH]] for g in gaps[: o.most]]
    print(text_table(["gap, us", "after", "before"], rows, left=(1, 2)))
    span = max(k.start + k.length for k in kernels) - kernels[0].start
    idle = sum(gap.length for gap in gaps)
    said = f"{len(kernels)} kernels in {span / 1000:.1f} ms; idle for {100 * idle / span:.1f} %"
    print(f"{said}, in {len(gaps)} gaps")
    return 0


if __name__ == "__main__":
    sys.exit(command("gpu.trace", Options, run))

"""The study's table, its plot, and the differences between rows with their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.study.rows import PAIRS
from rsnet.evaluation.compare import RunSummary, markdown_table

# Student's t of a two-sided 95 % interval, by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Groups = Mapping[str, Sequence[RunSummary]]


def differences(groups: Groups) -> str:
    """Return a Markdown table of the differences of top-1, in points, between rows' runs of the same seed.

    Mean and 95 % interval over the seeds (paired t-test); without an interval where there is one seed.
    """
    names = sorted({n for runs in groups.values() for r in runs for n in r.sizes}, key=int)[::-1]
    rows = [["points", *names, "mean of sizes"]]
    for one, other in PAIRS:
        a, b = (_by_seed(groups.get(label, [])) for label in (one, other))
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            continue
        cells = [[a[s][n] - b[s][n] for s in seeds if n in a[s] and n in b[s]] for n in names]
        complete = [s for s in seeds if a[s].keys() == b[s].keys()]
        means = [statistics.mean(a[s][n] - b[s][n] for n in a[s]) for s in complete]
        rows.append([f"{one} - {other}", *map(_interval, [*cells, means])])
    return markdown_table(rows) if len(rows) > 1 else ""


def _by_seed(runs: Sequence[RunSummary]) -> dict[int, dict[str, float]]:
    """Return the accuracies by seed and size; networks of one size each are taken together."""
    found: dict[int, dict[str, float]] = {}
    for run in runs:
        found.setdefault(run.seed, {}).update({n: run.top1[n] for n in run.sizes})
    return found


def _interval(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):+.2f}"
    if len(values) < 2:
        return mean
    half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.2f}"

"""The study's page: what its rows are, how many runs are finished, and how they differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.study import cost
from benchmarks.study.rows import MEANING, PAIRS, Job, image_gmacs
from rsnet.evaluation.compare import RunSummary, markdown_table, tables

# Student's t of a two-sided 95 % interval, by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Groups = Mapping[str, Sequence[RunSummary]]
Finished = Mapping[str, RunSummary]  # by the runs' names


def page(command: str, choice: str, jobs: Sequence[Job], found: Finished) -> tuple[str, Groups]:
    """Return the Markdown page of the runs that are finished, and those of whole seeds, by row.

    command: what writes it. choice: how the learning rate was chosen.
    """
    whole = [
        job for seed in _seeds(jobs).values() if all(j.name in found for j in seed) for job in seed
    ]
    groups = {
        row: [found[j.name] for j in whole if j.row == row]
        for row in dict.fromkeys(j.row for j in jobs)
    }
    groups = {row: runs for row, runs in groups.items() if runs}
    finished = f"{len(found)} of {len(jobs)} runs are finished"
    if len(found) < len(jobs):
        finished += ", so that rows and seeds are missing below; the same command goes on"
    text = f"# Ways to train, compared\n\n    {command}\n\n{choice} {finished}.\n"
    if groups:
        text += (
            f"\n## Rows\n\n{_overview(jobs, whole, found)}\n\n## Top-1 and cost\n\n"
            "Mean ± standard deviation over the seeds. Times are also of what else ran on a machine: compare "
            f"operations.\n\n{tables(groups)}\n"
        )
    if compared := differences(groups):
        text += (
            "\n## Differences\n\nPoints of top-1 between runs of the same seed: mean ± half of the 95 % "
            f"interval (paired t-test); of one seed, the difference alone.\n\n{compared}\n"
        )
    return text, groups


def _seeds(jobs: Sequence[Job]) -> dict[tuple[str, int], list[Job]]:
    """Return the runs that a row has of each seed: several for networks of one size each."""
    found: dict[tuple[str, int], list[Job]] = {}
    for job in jobs:
        found.setdefault((job.row, job.seed), []).append(job)
    return found


def _overview(jobs: Sequence[Job], whole: Sequence[Job], found: Finished) -> str:
    """Return a Markdown table of the rows: what they are, seeds finished of those planned, operations."""
    table = [["row", "what", "sizes", "seeds", "epochs", "operations, 10^12 MACs"]]
    for row in dict.fromkeys(job.row for job in jobs):
        planned = [j for j in jobs if j.row == row]
        first = [j for j in planned if j.seed == planned[0].seed]
        configs = [cost.configuration(j.options) for j in first]
        runs = [found[j.name] for j in whole if j.row == row]
        seeds = len(runs) // len(first)
        # All seeds' trainings cost the same, image by image.
        per_image = [image_gmacs(j) for j in first if seeds] * seeds
        total = sum(run.images * gmacs for run, gmacs in zip(runs, per_image, strict=True))
        table.append(
            [
                row,
                MEANING[row],
                " ".join(str(size) for c in configs for size in c.sizes),
                f"{seeds} of {len(planned) // len(first)}",
                str(configs[0].epochs),
                f"{total / seeds / 1000:.3g}" if seeds else "",
            ]
        )
    return markdown_table(table)


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

"""Whether a cascade beats the best single size that is as fast, on images that it was not fitted to.

    python -m benchmarks.cascade --release release --data cifar/val --batch-size 64

Prints a Markdown table: for limits of an image's average time, each size's and in the middle between two,
the top-1 of the best size within it, of two sizes mixed at random so that they take just as long, and of the
cascade that `python -m rsnet tune --target-ms` finds; means over random halves of the images, one to fit to
and one to report. The spread is that of the difference between cascade and size over the halves.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.options import command
from pipelines.utils.errors import error_context
from rsnet.inference import cascade_search
from rsnet.inference.calibration import LabelledLogits, collect_logits, find_labelled_images
from rsnet.inference.cascade_search import Answers
from rsnet.inference.classifier import SwitchableClassifier


@dataclass(frozen=True)
class Options:
    release: Path
    """Folder that `rsnet release` wrote."""

    data: Path
    """Folder with one folder of images per class."""

    batch_size: int = 64
    """Images a forward; too few, and all sizes take as long."""

    splits: int = 20
    """Random halves."""


@dataclass(frozen=True)
class Row:
    """Of one half that was not fitted to, within `limit` ms an image: top-1 in %; the cascade's ms."""

    limit: float
    size: int
    size_top1: float
    mix_top1: float
    top1: float
    ms: float


def limits(ms: Mapping[int, float]) -> list[float]:
    """What each size takes, and the middles between."""
    times = sorted(ms.values())
    return sorted(times + [(a + b) / 2 for a, b in itertools.pairwise(times)])


def compare(found: LabelledLogits, ms: Mapping[int, float], splits: int) -> Iterator[Row]:
    """Choose size, mix and cascade on one half of the images; return their results on the other."""
    as_they_are = dict.fromkeys(ms, 1.0)
    for seed in range(splits):
        fitted, other = (cascade_search.answers(h, as_they_are) for h in found.halves(seed))
        frontier = cascade_search.search(fitted, ms)
        for limit in limits(ms):
            size = cascade_search.best_size(fitted, ms, limit)
            assert size is not None  # the fastest itself
            chosen = [outcome for outcome in frontier if outcome.ms <= limit][-1]
            reported = cascade_search.simulate(other, chosen.cascade, ms)
            size_top1 = 100 * float(other.right[size].mean())
            mixed = mix(fitted, other, ms, limit)
            yield Row(limit, size, size_top1, mixed, reported.top1, reported.ms)


def mix(fitted: Answers, other: Answers, ms: Mapping[int, float], limit: float) -> float:
    """Top-1 on `other`, in %, of the two sizes and the share that are best on `fitted`."""
    mixes = []
    for a, b in itertools.product(ms, ms):
        if ms[a] <= limit:
            share = min(1.0, (limit - ms[a]) / (ms[b] - ms[a])) if ms[b] > ms[a] else 0.0
            on_both = [
                100 * float((1 - share) * half.right[a].mean() + share * half.right[b].mean())
                for half in (fitted, other)
            ]
            mixes.append(on_both)
    return max(mixes)[1]


def run(o: Options) -> int:
    with error_context("--release"):
        classifier = SwitchableClassifier.load(o.release, batch_size=o.batch_size)
    folder = find_labelled_images(o.data, classifier.config["network"])
    found = collect_logits(classifier, folder)
    ms = classifier.ms_per_image()
    rows = list(compare(found, ms, o.splits))
    print(classifier.conditions)
    name_of = {time: f"size {size}" for size, time in ms.items()}
    print("| within, ms | | best size | its top-1 % | mix | cascade | its ms | cascade - size |")
    print("|---|---|---|---|---|---|---|---|")
    for limit in limits(ms):
        some = [row for row in rows if row.limit == limit]
        size_top1, mixed, top1, time = (
            statistics.mean(getattr(row, name) for row in some)
            for name in ("size_top1", "mix_top1", "top1", "ms")
        )
        differences = [row.top1 - row.size_top1 for row in some]
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        sizes = " or ".join(map(str, sorted({row.size for row in some})))
        print(
            f"| {limit:.3f} | {name_of.get(limit, '')} | {sizes} | {size_top1:.2f} | {mixed:.2f} "
            f"| {top1:.2f} | {time:.3f} | {statistics.mean(differences):+.2f} ± {spread:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(command("cascade", Options, run))

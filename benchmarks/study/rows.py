"""The rows of the study's table, and the training runs that each is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from benchmarks.study import cost

LR_SEED = 1000  # of the runs that choose the learning rate: none of the study's

INDIVIDUAL = "individual networks"
SHARED = "shared BatchNorm"
PRIVATE = "private BatchNorm"
ENS = "private + ens"
TOPDOWN = "private + ens_topdown"
PRIVATE_NORM = "private, norm-lr-mult"
TOPDOWN_NORM = "ens_topdown, norm-lr-mult"
FEW = "ens_topdown, three sizes"
TEACHER = "the same with a teacher"
STRONG = "the same, recipe strong"
K = "the same, two sizes a step"
K_LONGER = "two sizes a step, equal cost"
SCHEDULE = "few sizes first, equal cost"
SCHEDULE_ALL = "all sizes, few of them first"
FAR_SHARED = "shared, sizes far apart"
FAR_PRIVATE = "private, sizes far apart"

# What they are, for who reads the table alone.
MEANING = {
    INDIVIDUAL: "an ordinary network for each size",
    SHARED: "one network for all sizes, one BatchNorm, no distillation",
    PRIVATE: "one network, BatchNorm for each size, no distillation",
    ENS: "the same, the sizes' ensemble teaches each size",
    TOPDOWN: "the same, larger sizes teach, too: the paper's RS-Net",
    PRIVATE_NORM: "as private BatchNorm, whose learning rate is times the number of sizes",
    TOPDOWN_NORM: "the same, with the paper's distillation",
    FEW: "the paper's RS-Net",
    TEACHER: "a wider network of the largest size, trained before, teaches, too",
    STRONG: "mixup, CutMix, TrivialAugment, erasing, averaged weights, smaller images",
    K: "the largest size and one other, drawn at random, for as many epochs",
    K_LONGER: "the largest size and one other, drawn at random, for more epochs",
    SCHEDULE: "the smallest size alone, then one more after each part, for more epochs",
    SCHEDULE_ALL: "the same, of all sizes",
    FAR_SHARED: "as shared BatchNorm",
    FAR_PRIVATE: "as private BatchNorm",
}

# What is compared with what: of the same sizes.
PAIRS = (
    (PRIVATE, SHARED),
    (PRIVATE, INDIVIDUAL),
    (ENS, PRIVATE),
    (TOPDOWN, PRIVATE),
    (TOPDOWN, INDIVIDUAL),
    (PRIVATE_NORM, PRIVATE),
    (PRIVATE_NORM, SHARED),
    (PRIVATE_NORM, INDIVIDUAL),
    (TOPDOWN_NORM, TOPDOWN),
    (TOPDOWN_NORM, PRIVATE_NORM),
    (TOPDOWN_NORM, INDIVIDUAL),
    (TEACHER, FEW),
    (STRONG, FEW),
    (K, FEW),
    (K_LONGER, FEW),
    (SCHEDULE, FEW),
    (SCHEDULE, K_LONGER),
    (SCHEDULE_ALL, TOPDOWN),
    (SCHEDULE_ALL, INDIVIDUAL),
    (FAR_PRIVATE, FAR_SHARED),
)


@dataclass(frozen=True)
class Options:
    """Compare what RS-Nets add, on any image folder."""

    data: Path
    """Folder with train/CLASS/IMAGE and val/CLASS/IMAGE."""

    output: Path
    """Folder of all runs."""

    results: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of the finished runs' small files, the table and the plot. Unset: --output. A run that has its
    file here is not run again, on whatever machine it was."""

    per_class: Annotated[int | None, arg(metavar="INT")] = None
    """Training images of each class. Unset: all."""

    arch: str = "parallel_resnet10"
    """Network."""

    stem: str = "imagenet"
    """First layer: imagenet or small."""

    width_mult: float = 1.0
    """Width of its layers."""

    teacher_width: float = 2.0
    """Width of the teacher's layers."""

    sizes: tuple[int, ...] = (32, 28, 24, 20, 16)
    """Input sizes."""

    few_sizes: tuple[int, ...] = (32, 24, 16)
    """Those of the rows with a teacher, the strong recipe, fewer sizes a step."""

    far_sizes: tuple[int, ...] = (40, 24, 12)
    """Those of the rows with sizes far apart."""

    epochs: int = 60
    """Epochs of every run but those that have more at equal cost."""

    batch_size: int = 64
    """Images a step."""

    lr: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Learning rate of networks of one size. Unset: that of --lrs with which one of the largest is best."""

    lrs: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4)
    """Learning rates to choose from."""

    joint_lr: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Learning rate of networks of several sizes, whose losses are summed. Unset: that of --joint-lrs with
    which shared BatchNorm is best in the mean over --sizes."""

    joint_lrs: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Learning rates to choose from."""

    seeds: int = 3
    """Runs of each of the first seven rows."""

    few_seeds: int = 2
    """Runs of each of the others."""

    amp: str = "off"
    """Precision of all runs, the same on every machine: off, bf16 or fp16."""

    jobs: int = 1
    """Runs at a time."""

    workers: int = 1
    """DALI's threads of each."""


@dataclass(frozen=True)
class Job:
    """A training run. row: of the table. name: of its directory and file. options: without those that say
    where it runs. table: of its images. work: pixels of an image, to estimate the time left, the same for
    runs of equal cost. teacher: the run that teaches it."""

    row: str
    name: str
    seed: int
    options: list[str]
    table: str = "study.csv"
    work: int = 0
    teacher: Job | None = field(default=None, compare=False)


def individual_jobs(o: Options, lr: float, seeds: Iterable[int]) -> Iterator[Job]:
    """Yield the runs of networks of one size each."""
    for seed in seeds:
        for size in o.sizes:
            yield _job(o, INDIVIDUAL, (size,), seed, lr, ["--no-kd"])


def jobs_of(o: Options, single_lr: float, lr: float) -> Iterator[Job]:
    """Yield the runs of the table, seed by seed, so that a study that is cut short has whole seeds.

    single_lr: learning rate of networks of one size. lr: of all others. Sizes far apart, which the paper
    has not, come last.
    """
    for seed in range(max(o.seeds, o.few_seeds)):
        if seed < o.seeds:
            yield from individual_jobs(o, single_lr, [seed])
            yield _job(o, SHARED, o.sizes, seed, lr, ["--no-kd", "--norm", "shared"])
            yield _job(o, PRIVATE, o.sizes, seed, lr, ["--no-kd"])
            yield _job(o, ENS, o.sizes, seed, lr, ["--kd-type", "ens"])
            yield _job(o, TOPDOWN, o.sizes, seed, lr, [])
            norm = ["--norm-lr-mult", str(len(o.sizes))]
            yield _job(o, PRIVATE_NORM, o.sizes, seed, lr, ["--no-kd", *norm])
            yield _job(o, TOPDOWN_NORM, o.sizes, seed, lr, norm)
        if seed < o.few_seeds:
            teacher = teacher_job(o, single_lr)
            yield _job(o, FEW, o.few_sizes, seed, lr, [])
            yield _job(o, TEACHER, o.few_sizes, seed, lr, [], teacher=teacher)
            yield _job(o, STRONG, o.few_sizes, seed, lr, ["--recipe", "strong"])
            yield _job(o, K, o.few_sizes, seed, lr, ["--sizes-per-step", "2"])
            yield _two_a_step_longer(o, seed, lr)
            yield _few_first_longer(o, SCHEDULE, o.few_sizes, seed, lr)
            yield _few_first_longer(o, SCHEDULE_ALL, o.sizes, seed, lr)
    for seed in range(o.few_seeds):
        yield _job(o, FAR_SHARED, o.far_sizes, seed, lr, ["--no-kd", "--norm", "shared"])
        yield _job(o, FAR_PRIVATE, o.far_sizes, seed, lr, ["--no-kd"])


def _two_a_step_longer(o: Options, seed: int, lr: float) -> Job:
    """Return the run of two sizes a step that takes as many operations as all in each, for more epochs."""
    costs, budget = _costs_and_budget(o, o.few_sizes)
    longer = dataclasses.replace(o, epochs=cost.epochs_of(budget, costs, 2))
    return _job(longer, K_LONGER, o.few_sizes, seed, lr, ["--sizes-per-step", "2"])


def _few_first_longer(o: Options, row: str, sizes: tuple[int, ...], seed: int, lr: float) -> Job:
    """Return the run of few sizes first that takes as many operations as all from the start."""
    costs, budget = _costs_and_budget(o, sizes)
    epochs, words = cost.schedule_of(budget, costs)
    longer = dataclasses.replace(o, epochs=epochs)
    return _job(longer, row, sizes, seed, lr, ["--size-schedule", *words])


def _costs_and_budget(o: Options, sizes: tuple[int, ...]) -> tuple[Mapping[int, float], float]:
    """Return the costs of each size, and of a training of all of them in each step."""
    costs = cost.size_costs(o.arch, o.stem, o.width_mult, sizes)
    return costs, o.epochs * sum(costs.values())


def teacher_job(o: Options, lr: float) -> Job:
    """Return the run of the teacher: a wider network of the largest size alone."""
    return _job(o, "teacher", (max(o.few_sizes),), 0, lr, ["--no-kd"], width=o.teacher_width)


def image_gmacs(job: Job) -> float:
    """Return the GMACs that a training image costs in a run, with its teacher's forward."""
    # A teacher is of one size; its own training has three forwards' worth.
    taught = 0.0 if job.teacher is None else image_gmacs(job.teacher) / cost.FORWARDS
    return cost.training_gmacs(job.options) + taught


def lr_jobs(o: Options) -> dict[float, Job]:
    """Return the runs that choose the learning rate of networks of one size, by it: of the largest."""
    size = max(o.sizes)
    return {
        lr: _job(o, f"lr {lr:g}", (size,), LR_SEED, lr, ["--no-kd"], table="lr.csv") for lr in o.lrs
    }


def joint_lr_jobs(o: Options) -> dict[float, Job]:
    """Return the runs that choose the learning rate of networks of several sizes, by it.

    They have shared BatchNorm, the row that all others are to be better than.
    """
    words = ["--no-kd", "--norm", "shared"]
    return {
        lr: _job(o, f"joint lr {lr:g}", o.sizes, LR_SEED, lr, words, table="lr.csv")
        for lr in o.joint_lrs
    }


def _job(
    o: Options,
    row: str,
    sizes: tuple[int, ...],
    seed: int,
    lr: float,
    options: list[str],
    *,
    teacher: Job | None = None,
    width: float | None = None,
    table: str = "study.csv",
) -> Job:
    fixed = {
        "arch": o.arch, "stem": o.stem, "width-mult": width or o.width_mult, "epochs": o.epochs,
        "batch-size": o.batch_size, "amp": o.amp, "lr": lr, "seed": seed,
        "val-interval": o.epochs,
    }  # fmt: skip
    words = [word for key, value in fixed.items() for word in (f"--{key}", str(value))]
    words += ["--sizes", *map(str, sizes), *options]
    size = f"_{sizes[0]}" if row == INDIVIDUAL else ""
    name = f"{row.replace(' ', '_').replace(',', '')}{size}_seed{seed}"
    return Job(row, name, seed, words, table, sum(s * s for s in sizes), teacher)

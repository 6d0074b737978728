"""What private BatchNorm and distillation do: the paper's comparison, under one budget.

    python -m benchmarks.study --data cifar10 --output study --stem small --width-mult 0.25 --jobs 2

Trains, for every seed: one network for each size; one for all sizes with shared BatchNorm, with private
BatchNorm, with distillation from the ensemble, and from the larger sizes, too; and the last with K sizes
a step. Every run is one command of train_dali.py in a directory of its own (command.txt, run.log). The
same command again goes on where it was stopped. Writes study.md and study.png.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipelines.utils.cli import command
from pipelines.utils.errors import DataError, UsageError
from rsnet.evaluation.compare import RunSummary, plot, read_run, tables
from rsnet.loggers.console import ConsoleLogger

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    """Compare what RS-Nets add, on any image folder."""

    data: Path
    """Folder with train/CLASS/IMAGE and val/CLASS/IMAGE."""

    output: Path
    """Folder of all runs, the table and the plot."""

    arch: str = "parallel_resnet10"
    """Network."""

    stem: str = "imagenet"
    """First layer: imagenet or small."""

    width_mult: float = 1.0
    """Width of its layers."""

    sizes: tuple[int, ...] = (32, 28, 24, 20, 16)
    """Input sizes."""

    sizes_per_step: tuple[int, ...] = (2, 3)
    """The K of the runs with fewer sizes a step."""

    epochs: int = 3
    """Epochs of every run."""

    batch_size: int = 128
    """Images a step."""

    lr: float = 0.02
    """Learning rate of the networks of several sizes, whose losses are summed."""

    lr_individual: float = 0.05
    """Learning rate of the individual networks, which have one loss."""

    seeds: int = 3
    """Runs of each kind."""

    jobs: int = 1
    """Runs at a time."""

    workers: int = 1
    """DALI's threads of each."""


class Job(NamedTuple):
    label: str
    path: Path
    options: list[str]
    work: int  # sizes a step, to estimate the time left


def kinds(o: Options) -> dict[str, list[list[str]]]:
    """Label -> the options of its runs: one, or one a size."""
    sizes = ["--lr", str(o.lr), "--sizes", *map(str, o.sizes)]
    return {
        "individual networks": [
            ["--sizes", str(s), "--no-kd", "--lr", str(o.lr_individual)] for s in o.sizes
        ],
        "shared BN": [[*sizes, "--no-kd", "--norm", "shared"]],
        "private BN": [[*sizes, "--no-kd"]],
        "private BN, ens": [[*sizes, "--kd-type", "ens"]],
        "private BN, ens_topdown": [[*sizes, "--kd-type", "ens_topdown"]],
        **{f"K = {k}": [[*sizes, "--sizes-per-step", str(k)]] for k in o.sizes_per_step},
    }


def jobs_of(o: Options) -> Iterator[Job]:
    """All runs, seed by seed, so that a study that is cut short has whole seeds."""
    fixed = {
        "data": o.data.resolve(), "arch": o.arch, "stem": o.stem, "width-mult": o.width_mult,
        "epochs": o.epochs, "batch-size": o.batch_size, "workers": o.workers, "wandb": "disabled",
        "resume": "auto",
    }  # fmt: skip
    common = [word for key, value in fixed.items() for word in (f"--{key}", str(value))]
    for seed in range(o.seeds):
        for label, runs in kinds(o).items():
            for options in runs:
                single = len(runs) > 1
                name = label + (f" {options[1]}" if single else "")
                path = (
                    o.output.resolve()
                    / f"{name.replace(' ', '_').replace(',', '')}"
                    / f"seed{seed}"
                )
                work = 1 if single else len(o.sizes)
                if "--sizes-per-step" in options:
                    work = int(options[-1])
                words = [*common, *options, "--seed", str(seed), "--output", str(path)]
                yield Job(label, path, words, work)


def claim(job: Job) -> None:
    """Note a job's options in its directory. Raises UsageError if it holds a run with others."""
    note = job.path / "options.txt"
    aside = ("--data", "--workers", "--output")  # where it runs does not change a run
    pairs = [w for i, w in enumerate(job.options) if not {w, job.options[i - 1]} & {*aside}]
    wanted = shlex.join(pairs)
    if note.is_file() and note.read_text() != wanted:
        raise UsageError(
            f"--output: {job.path} holds a run with {note.read_text()}; this study has {wanted}. "
            "Give another folder"
        )
    job.path.mkdir(parents=True, exist_ok=True)
    note.write_text(wanted)


def train(job: Job, threads: int) -> None:
    """Run one job, unless it is finished. Raises DataError with the last line of a run that failed."""
    if (job.path / "results.json").is_file():
        return
    with (job.path / "run.log").open("a") as log:
        done = subprocess.run(
            [sys.executable, "train_dali.py", *job.options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        last = (job.path / "run.log").read_text().strip().splitlines()[-1:]
        raise DataError(f"{job.path / 'run.log'}: {''.join(last)}")


def write_results(o: Options, jobs: Sequence[Job]) -> None:
    """The table and the plot of the runs that are finished."""
    groups: dict[str, list[RunSummary]] = {}
    for job in jobs:
        if (job.path / "results.json").is_file():
            groups.setdefault(job.label, []).append(read_run(job.path))
    if groups:
        typed = shlex.join(["python", "-m", "benchmarks.study", *sys.argv[1:]])
        (o.output / "study.md").write_text(f"    {typed}\n\n{tables(groups)}\n")
        plot(o.output / "study.png", groups)


def run(o: Options) -> int:
    if min(o.seeds, o.jobs) < 1:
        raise UsageError("--seeds and --jobs: at least 1")
    for k in o.sizes_per_step:
        if not 1 < k <= len(o.sizes):
            raise UsageError(
                f"--sizes-per-step {k}: from 2 to the number of --sizes, {len(o.sizes)}"
            )
    o.output.mkdir(parents=True, exist_ok=True)
    jobs = list(jobs_of(o))
    threads = max(1, len(os.sched_getaffinity(0)) // o.jobs)
    display = ConsoleLogger(active=True)
    display.start("study", sum(job.work for job in jobs), images=0)
    done = 0
    for job in jobs:
        claim(job)
    with ThreadPoolExecutor(o.jobs) as pool:
        running = {pool.submit(train, job, threads): job for job in jobs}
        try:
            for future in as_completed(running):
                future.result()
                job = running[future]
                done += job.work
                write_results(o, jobs)
                display.update(done, str(job.path.relative_to(o.output.resolve())), prints=True)
        finally:
            pool.shutdown(cancel_futures=True)
            display.stop()
    print((o.output / "study.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(command("benchmarks.study", Options, run))

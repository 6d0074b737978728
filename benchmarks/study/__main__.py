"""What private BatchNorm, distillation and the rest do: the paper's comparison, under one budget.

    python -m benchmarks.study --data cifar10 --output study --per-class 500 --stem small --width-mult 0.25 \
        --teacher-width 0.5 --jobs 2

Chooses two learning rates, on a tenth of the training images: of networks of one size, and of those of
several, whose losses are summed; then trains, for every seed, the rows of `rows`. Every run is one command of
train_dali.py in a directory of its own (run.log), and leaves a small file in --results. The same command
again goes on where it was stopped, on another machine, too, if it has these files. Writes study.md and .png.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.options import command
from benchmarks.study.report import page
from benchmarks.study.rows import (
    Job,
    Options,
    individual_jobs,
    jobs_of,
    joint_lr_jobs,
    lr_jobs,
    teacher_job,
)
from benchmarks.study.subset import write_tables
from pipelines.utils.atomic_io import atomic_write
from pipelines.utils.errors import DataError, UsageError
from pipelines.utils.schema import parsing, read_json
from rsnet.evaluation.compare import RunSummary, plot, read_run
from rsnet.inference.latency import device_name
from rsnet.loggers.console import ConsoleLogger

ROOT = Path(__file__).parents[2]


class Study:
    """The runs of a study: which are finished, and how one is run."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.output = options.output.resolve()
        self.results = (options.results or options.output).resolve()
        self.threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
        self.console = ConsoleLogger(active=True)
        self._running: set[subprocess.Popen[bytes]] = set()

    def summary(self, job: Job) -> RunSummary | None:
        """Return a finished run, None if there is none.

        Raises UsageError if the file is of a run with other options, DataError if it is damaged.
        """
        path = self.results / f"{job.name}.json"
        if not path.is_file():
            return None
        with parsing(path, "remove it to have it run again"):
            found: dict[str, Any] = read_json(path, "remove it to have it run again")
            if found["options"] != shlex.join(job.options):
                raise UsageError(
                    f"--results: {path} is of a run with {found['options']}; this study has "
                    f"{shlex.join(job.options)}. Give another folder"
                )
            return RunSummary(**found["run"] | {"path": path})

    def run(self, jobs: Sequence[Job], title: str) -> None:
        """Run those that are not finished, and before them the teacher that they need, if it is not there.

        Where it is interrupted, or one of them fails, the others that run save their state and end.
        Raises DataError with the last line of a run that failed.
        """
        jobs = [job for job in jobs if self.summary(job) is None]
        teacher = next((job.teacher for job in jobs if job.teacher), None)  # the same of all
        if teacher and not (self.output / teacher.name / "results.json").is_file():
            of_another_machine = self.results / f"{teacher.name}.json"
            of_another_machine.unlink(missing_ok=True)
            jobs.insert(0, teacher)
        self.console.start(title, sum(job.work for job in jobs), images=0)
        done = 0
        with ThreadPoolExecutor(self.options.jobs) as pool:
            running: dict[str, Future[None]] = {}
            for job in jobs:
                # Submitted before, so that one thread is enough for both.
                awaited = running.get(job.teacher.name) if job.teacher else None
                running[job.name] = pool.submit(self._train, job, awaited)
            work = {running[job.name]: job for job in jobs}
            try:
                for future in as_completed(work):
                    future.result()
                    done += work[future].work
                    self.console.update(done, work[future].name, prints=True)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in tuple(self._running):
                    process.terminate()  # it saves its state
                self.console.stop()

    def write(self, jobs: Sequence[Job], choice: str) -> str:
        """Write the page of the runs that are finished, and plot the rows of all sizes; return the page."""
        found = {job.name: run for job in jobs if (run := self.summary(job)) is not None}
        typed = shlex.join(["python", "-m", "benchmarks.study", *sys.argv[1:]])
        text, groups = page(typed, choice, jobs, found)
        if groups:
            (self.results / "study.md").write_text(text, "utf-8")
            every = {str(size) for size in self.options.sizes}
            whole = {
                r: runs for r, runs in groups.items() if every == {n for x in runs for n in x.sizes}
            }
            plot(self.results / "study.png", whole or groups)
        return text

    def _train(self, job: Job, teacher: Future[None] | None) -> None:
        if teacher:
            teacher.result()
        o, path = self.options, self.output / job.name
        path.mkdir(parents=True, exist_ok=True)
        words = [
            "--data",
            str(self.output / job.table),
            "--output",
            str(path),
            "--wandb",
            "disabled",
        ]
        words += ["--workers", str(o.workers), "--resume", "auto", *job.options]
        if job.teacher:
            words += ["--teacher", str(self.output / job.teacher.name)]
        with (path / "run.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "train_dali.py", *words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._running.add(process)
        code = process.wait()
        self._running.remove(process)
        if code:
            last = (path / "run.log").read_text().strip().splitlines()[-1:]
            raise DataError(f"{path / 'run.log'}: {''.join(last)}")
        found = dataclasses.asdict(read_run(path))
        del found["path"], found["options"]  # of this machine
        kept = {"options": shlex.join(job.options), "run": found | {"options": {}}} | _where()
        atomic_write(self.results / f"{job.name}.json", json.dumps(kept, indent=1).encode() + b"\n")


def choose_lr(study: Study, given: float | None, jobs: Mapping[float, Job]) -> tuple[float, str]:
    """Return the learning rate that is given, or else the best of the finished `jobs`; and both as text."""
    if given is not None:
        return given, f"{given:g}, as given"
    top1 = {}
    for lr, job in jobs.items():
        found = study.summary(job)
        assert found is not None
        top1[lr] = mean(found.top1[size] for size in found.sizes)
    best = max(top1, key=lambda lr: top1[lr])
    shown = ", ".join(f"{lr:g}: {value:.2f}" for lr, value in top1.items())
    return best, f"{best:g}, by top-1 % ({shown})"


def choose_lrs(study: Study) -> tuple[float, float, str]:
    """Return the learning rates of one size and of several, and how they were chosen, as text.

    Trains the networks that it takes. With those of several sizes, individual networks are trained, which do
    not wait for the choice: there are few of the former, and long ones.
    """
    o = study.options
    one, joint = lr_jobs(o), joint_lr_jobs(o)
    if o.lr is None:
        study.run(list(one.values()), "learning rate")
    single_lr, how = choose_lr(study, o.lr, one)
    if o.joint_lr is None:
        individual = individual_jobs(o, single_lr, range(o.seeds))
        study.run([*joint.values(), *individual], "learning rate of several sizes")
    joint_lr, how_joint = choose_lr(study, o.joint_lr, joint)
    text = f"Learning rate of networks of one size: {how}. Of those of several, whose losses are summed: "
    return single_lr, joint_lr, f"{text}{how_joint}."


def _where() -> dict[str, str]:
    """Return when and on what a run was made."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "commit": commit,
        "machine": device_name(torch.device("cpu")),
        "torch": torch.__version__,
    }


def run(o: Options) -> int:
    if min(o.seeds, o.few_seeds, o.jobs) < 1:
        raise UsageError("--seeds, --few-seeds and --jobs: at least 1")
    study = Study(o)
    study.output.mkdir(parents=True, exist_ok=True)
    study.results.mkdir(parents=True, exist_ok=True)
    write_tables(o.data.resolve(), study.output, o.per_class)
    single_lr, lr, choice = choose_lrs(study)
    jobs, teacher = list(jobs_of(o, single_lr, lr)), teacher_job(o, single_lr)
    for job in [teacher, *jobs]:
        study.summary(job)  # what is of another study is found before hours of work
    try:
        study.run(jobs, "study")
    finally:
        text = study.write(jobs, choice)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(command("study", Options, run))

"""The study's runs: what they are, that they are not run twice, and what is made of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import tyro

from benchmarks.options import command
from benchmarks.study import __main__ as study
from benchmarks.study import report, rows
from benchmarks.study.subset import write_tables
from pipelines.dali import DaliOptions
from pipelines.sources.manifest import read
from pipelines.utils.cli import EXIT_INTERRUPTED
from pipelines.utils.errors import DataError, UsageError
from rsnet.config.command_line import parse
from rsnet.evaluation.compare import RunSummary
from tests.helpers.processes import ROOT
from tests.helpers.servers import until


@pytest.fixture
def options(photos, tmp_path):
    return study.Options(
        photos, tmp_path / "study", seeds=2, few_seeds=1, per_class=6, lr=0.1, joint_lr=0.1
    )


def _jobs(o):
    return [
        rows.teacher_job(o, 0.1),
        *rows.jobs_of(o, 0.1, 0.1),
        *rows.lr_jobs(o).values(),
        *rows.joint_lr_jobs(o).values(),
    ]


@pytest.mark.slow
def test_every_run_is_a_command_of_train_dali(options):
    jobs = _jobs(options)
    configs = [parse(DaliOptions, ["--data", "x", *job.options])[0] for job in jobs]
    assert len({job.name for job in jobs}) == len(jobs) == 1 + 2 * (5 + 6) + 9 + 5 + 3
    first = {
        job.row: (c.sizes, c.kd is not False, c.kd_type or "ens_topdown", c.norm)
        for job, c in zip(jobs, configs, strict=True)
    }
    five, far = options.sizes, options.far_sizes
    assert first[rows.SHARED] == (five, False, "ens_topdown", "shared")
    assert first[rows.PRIVATE] == (five, False, "ens_topdown", None)
    assert first[rows.ENS] == (five, True, "ens", None)
    assert first[rows.TOPDOWN] == (five, True, "ens_topdown", None)
    mults = {job.row: c.norm_lr_mult for job, c in zip(jobs, configs, strict=True)}
    assert (mults[rows.PRIVATE_NORM], mults[rows.TOPDOWN_NORM]) == (5, 5)
    assert first[rows.FAR_SHARED] == (far, False, "ens_topdown", "shared")
    assert {
        c.sizes for c, job in zip(configs, jobs, strict=True) if job.row == rows.INDIVIDUAL
    } == {(size,) for size in five}


def test_rows_of_equal_cost_train_as_many_pixels_as_the_plain_one(options):
    """This network's convolutions cost a pixel the same at 32, 24 and 16: 1024, 576 and 256 of them."""
    small = dataclasses.replace(options, stem="small", width_mult=0.25)
    jobs = {job.row: job for job in rows.jobs_of(small, 0.1, 0.1)}
    budget = 60 * (1024 + 576 + 256)
    two, few_first = ({} for _ in range(2))
    for found, row in ((two, rows.K_LONGER), (few_first, rows.SCHEDULE)):
        words = jobs[row].options
        found["epochs"] = int(words[words.index("--epochs") + 1])
        found["words"] = words[words.index("16") + 1 :]
    assert two["words"] == ["--sizes-per-step", "2"]
    assert two["epochs"] * (1024 + (576 + 256) / 2) <= budget
    assert (two["epochs"] + 1) * (1024 + (576 + 256) / 2) > budget
    assert few_first == {
        "epochs": 113,
        "words": ["--size-schedule", "0:16", "38:24,16", "75:all"],
    }
    trained = 38 * 256 + 37 * (576 + 256) + 38 * (1024 + 576 + 256)
    assert 0.99 * budget < trained <= budget
    plain, longer = (
        60 * rows.image_gmacs(jobs[rows.FEW]),
        113 * rows.image_gmacs(jobs[rows.SCHEDULE]),
    )
    assert longer == pytest.approx(plain * trained / budget, rel=1e-3)
    of_all = jobs[rows.SCHEDULE_ALL]
    assert of_all.options[-5:] == ["0:16", "25:20,16", "50:24,20,16", "76:28,24,20,16", "101:all"]
    part = 126 * rows.image_gmacs(of_all) / (60 * rows.image_gmacs(jobs[rows.TOPDOWN]))
    assert 0.99 < part <= 1


def test_finished_runs_that_are_kept_are_still_of_the_study_that_the_manual_names():
    (words,) = (
        line.split()[3:]
        for line in (ROOT / "docs" / "recipes.md").read_text().splitlines()
        if line.startswith("python -m benchmarks.study") and "--per-class" in line
    )
    o = tyro.cli(study.Options, args=words)
    kept = list((ROOT / "benchmarks" / "results" / "study_cifar10").glob("*.json"))
    assert kept
    for path in kept:
        options = json.loads(path.read_text())["options"].split()
        lr = float(options[options.index("--lr") + 1])
        jobs = [
            rows.teacher_job(o, lr),
            *rows.jobs_of(o, lr, lr),
            *rows.lr_jobs(o).values(),
            *rows.joint_lr_jobs(o).values(),
        ]
        assert [job.options for job in jobs if job.name == path.stem] == [options]


def test_the_page_of_some_runs_has_whole_seeds_alone_and_says_what_is_missing(options, tmp_path):
    o = dataclasses.replace(options, sizes=(32, 16), few_seeds=1, stem="small", width_mult=0.25)
    chosen = (rows.INDIVIDUAL, rows.PRIVATE, rows.TEACHER)
    jobs = [job for job in rows.jobs_of(o, 0.1, 0.1) if job.row in chosen]
    found = {}
    for job in jobs:
        size = job.options[job.options.index("--sizes") + 1]
        found[job.name] = dataclasses.replace(
            _summary(job.seed, {size: 50.0 + job.seed}, tmp_path), images=1000.0
        )
    del found["individual_networks_16_seed1"], found["the_same_with_a_teacher_seed0"]
    text, groups = report.page("study --x", "Learning rate 0.1.", jobs, found)
    assert "Learning rate 0.1. 5 of 7 runs are finished, so that rows and seeds are missing" in text
    assert {row: len(runs) for row, runs in groups.items()} == {chosen[0]: 2, chosen[1]: 2}
    cells = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    by_row = {c[0]: c[2:] for c in cells[2:5]}
    one = rows.image_gmacs(jobs[0]) + rows.image_gmacs(jobs[1])  # GMACs, of 1000 images: 10^12 MACs
    assert by_row[rows.INDIVIDUAL] == ["32 16", "1 of 2", "60", f"{one:.3g}"]
    assert by_row[rows.PRIVATE] == ["32 16", "2 of 2", "60", f"{one:.3g}"]
    assert by_row[rows.TEACHER] == ["32 24 16", "0 of 1", "60", ""]
    assert "| private BatchNorm - individual networks | +0.00 |" in text
    one_seed = {job.name: found[job.name] for job in jobs[:2]}
    assert "2 of 2 runs are finished.\n" in report.page("x", "", jobs[:2], one_seed)[0]
    assert report.page("x", "", jobs, {})[0].endswith("the same command goes on.\n")


def test_whole_seeds_come_first_and_sizes_far_apart_last(options):
    jobs = list(rows.jobs_of(options, 0.1, 0.1))
    far = [job.row in (rows.FAR_SHARED, rows.FAR_PRIVATE) for job in jobs]
    assert far == sorted(far)
    for of_far in (False, True):
        seeds = [job.seed for job, is_far in zip(jobs, far, strict=True) if is_far == of_far]
        assert seeds == sorted(seeds)
        assert seeds


def test_the_images_are_chosen_by_their_names_and_the_learning_rate_on_others(options, tmp_path):
    tables = write_tables(options.data, tmp_path, 6)
    chosen, choice = (
        [(r["path"], r["split"]) for r in csv.DictReader(t.read_text().splitlines())]
        for t in tables
    )
    assert Counter(split for _, split in chosen) == {"train": 18, "val": 17}
    learn, held_out = ({p for p, split in choice if split == s} for s in ("train", "val"))
    assert len(held_out) == 3  # a tenth of six, rounded, of each class
    assert learn | held_out == {p for p, split in chosen if split == "train"}
    assert Counter(read(tables[0], "train").labels.tolist()) == {
        0: 6,
        1: 6,
        2: 6,
    }  # reads the files
    with pytest.raises(UsageError, match="--per-class 7: cat has 6 training images"):
        write_tables(options.data, tmp_path, 7)


def _summary(seed: int, top1: dict[str, float], tmp_path) -> RunSummary:
    ones = dict.fromkeys(top1, 1.0)
    return RunSummary(tmp_path, seed, top1, ones, 1, 1, 1.0, 1.0, {})


def test_differences_are_of_the_same_seed_with_a_t_interval(tmp_path):
    """2, 3, 4 have the mean 3 and the standard error 1 / sqrt(3); t of two degrees is 4.303: ± 2.48."""
    groups = {
        rows.SHARED: [
            _summary(s, {"32": 50.0 + 10 * s, "ensemble": 0}, tmp_path) for s in range(3)
        ],
        rows.PRIVATE: [
            _summary(s, {"32": 52.0 + 11 * s, "ensemble": 9}, tmp_path) for s in (2, 0, 1, 7)
        ],
    }
    lines = [line.split("|")[1:-1] for line in report.differences(groups).splitlines()]
    assert [cell.strip() for cell in lines[2]] == [
        "private BatchNorm - shared BatchNorm",
        "+3.00 ± 2.48",
        "+3.00 ± 2.48",
    ]


@pytest.fixture
def played(options, monkeypatch):
    """train_dali.py, played by a few lines that write a run's files; returns the list of its calls."""
    calls = options.output.parent / "calls"
    script = options.output.parent / "root" / "train_dali.py"
    script.parent.mkdir()
    script.write_text(
        f"import json, pathlib, sys\n"
        f"words = sys.argv\n"
        f"run = pathlib.Path(words[words.index('--output') + 1])\n"
        f"open({str(calls)!r}, 'a').write(run.name + '\\n')\n"
        f"tried = pathlib.Path({str(calls)!r} + '.tried')\n"
        f"if 'shared' in str(run) and not tried.exists():\n"
        f"    tried.touch()\n"
        f"    sys.exit('the disk is full')\n"
        f"if '--teacher' in words:\n"
        f"    assert (pathlib.Path(words[words.index('--teacher') + 1]) / 'results.json').exists()\n"
        f"top1 = 60.0 - abs(0.1 - float(words[words.index('--lr') + 1]))\n"
        f"one = {{'top1': top1, 'top5': 90.0, 'loss': 1.0}}\n"
        f"results = {{'gmacs': {{'32': 1.0, 'ensemble': 1.0}}}}\n"
        f"results['parameters'] = {{'shared': 9, 'private': 1}}\n"
        f"(run / 'results.json').write_text(json.dumps({{**results, '32': one, 'ensemble': one}}))\n"
        f"seed = int(words[words.index('--seed') + 1])\n"
        f"(run / 'config.json').write_text(json.dumps({{'seed': seed}}))\n"
        f"step = {{'step': 4, 'epoch': 1, 'perf/step_time': 1.0, 'perf/images_per_s': 8}}\n"
        f"(run / 'metrics.jsonl').write_text(json.dumps(step))\n"
    )
    monkeypatch.setattr(study, "ROOT", script.parent)
    monkeypatch.setattr(sys, "argv", ["study", "--data", "x"])
    return calls


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_stopped_and_elsewhere(options, played, capsys):
    options = dataclasses.replace(options, lr=None, joint_lr=None, seeds=1, stem="small")
    with pytest.raises(DataError, match=r"shared_BatchNorm_seed0/run\.log: the disk is full"):
        study.run(options)
    assert study.run(options) == 0
    calls = Counter(played.read_text().splitlines())
    assert set(calls) == {job.name for job in rows.jobs_of(options, 0.1, 0.1)} | {
        "teacher_seed0", *(f"lr_{lr:g}_seed{rows.LR_SEED}" for lr in options.lrs),
        *(f"joint_lr_{lr:g}_seed{rows.LR_SEED}" for lr in options.joint_lrs),
    }  # fmt: skip
    # Only what failed was run twice.
    assert {name for name, count in calls.items() if count > 1} == {"shared_BatchNorm_seed0"}
    table = (options.output / "study.md").read_text()
    assert "Learning rate of networks of one size: 0.1, by top-1 % (0.02: 59.92" in table
    assert (
        "whose losses are summed: 0.1, by top-1 % (0.02: 59.92, 0.05: 59.95, 0.1: 60.00)." in table
    )
    assert "| private + ens_topdown " in table
    assert "20 of 20 runs are finished." in table
    assert (options.output / "study.png").exists()
    # On another machine, with the small files alone: the teacher is needed for one run that is missing.
    results = options.output.parent / "results"
    results.mkdir()
    for file in options.output.glob("*.json"):
        if "teacher" not in file.name:
            (results / file.name).write_bytes(file.read_bytes())
    played.unlink()
    elsewhere = dataclasses.replace(options, output=options.output.parent / "new", results=results)
    assert study.run(elsewhere) == 0
    assert played.read_text().split() == ["teacher_seed0", "the_same_with_a_teacher_seed0"]
    assert "study: " in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_is_interrupted_ends_its_runs_and_says_what_is_finished(
    options, tmp_path, monkeypatch, capsys, number
):
    started = tmp_path / "started"
    (tmp_path / "train_dali.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))\n"
        f"pathlib.Path({str(started)!r}).touch()\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(study, "ROOT", tmp_path)

    def interrupt():
        until(started.exists)
        os.kill(os.getpid(), number)

    words = ["--data", str(options.data), "--output", str(options.output), "--per-class", "6"]
    handler = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor() as pool:
        interrupting = pool.submit(interrupt)
        code = command(
            "study", rows.Options, study.run, [*words, "--lr", "0.1", "--joint-lr", "0.1"]
        )
        interrupting.result()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert code == EXIT_INTERRUPTED
    (log,) = options.output.glob("*/run.log")
    assert log.read_text() == "saved\n"
    assert capsys.readouterr().err.endswith("benchmarks.study: interrupted\n")


def test_a_run_with_other_options_is_not_taken_for_one_of_the_study(options):
    job = next(rows.jobs_of(options, 0.1, 0.1))
    options.output.mkdir()
    run = dataclasses.asdict(_summary(0, {"32": 1.0}, options.output)) | {"path": None}
    text = json.dumps({"options": "--epochs 9", "run": run})
    (options.output / f"{job.name}.json").write_text(text)
    with pytest.raises(
        UsageError, match=r"is of a run with --epochs 9; this study has .*--epochs 60"
    ):
        study.run(options)

"""The study's runs: what they are, that they are not run twice, and what is made of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections import Counter

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study import report, rows
from benchmarks.study.subset import write_tables
from pipelines.dali import DaliOptions
from pipelines.sources.manifest import read
from pipelines.utils.errors import DataError, UsageError
from rsnet.config.command_line import parse
from rsnet.evaluation.compare import RunSummary


@pytest.fixture
def options(photos, tmp_path):
    return study.Options(photos, tmp_path / "study", seeds=2, few_seeds=1, per_class=6, lr=0.1)


def _jobs(o):
    return [rows.teacher_job(o, 0.1), *rows.jobs_of(o, 0.1), *rows.lr_jobs(o).values()]


@pytest.mark.slow
def test_every_run_is_a_command_of_train_dali(options):
    jobs = _jobs(options)
    configs = [parse(DaliOptions, ["--data", "x", *job.options])[0] for job in jobs]
    assert len({job.name for job in jobs}) == len(jobs) == 1 + 2 * (5 + 4) + 6 + 4
    first = {
        job.row: (c.sizes, c.kd, c.kd_type, c.norm) for job, c in zip(jobs, configs, strict=True)
    }
    five, far = options.sizes, options.far_sizes
    assert first[rows.SHARED] == (five, False, "ens_topdown", "shared")
    assert first[rows.PRIVATE] == (five, False, "ens_topdown", None)
    assert first[rows.ENS] == (five, True, "ens", None)
    assert first[rows.TOPDOWN] == (five, True, "ens_topdown", None)
    assert first[rows.FAR_SHARED] == (far, False, "ens_topdown", "shared")
    assert {
        c.sizes for c, job in zip(configs, jobs, strict=True) if job.row == rows.INDIVIDUAL
    } == {(size,) for size in five}


def test_whole_seeds_come_first(options):
    seeds = [int(job.name[-1]) for job in rows.jobs_of(options, 0.1)]
    assert seeds == sorted(seeds)


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
    options = dataclasses.replace(options, lr=None, seeds=1)
    with pytest.raises(DataError, match=r"shared_BatchNorm_seed0/run\.log: the disk is full"):
        study.run(options)
    assert study.run(options) == 0
    calls = Counter(played.read_text().splitlines())
    assert set(calls) == {job.name for job in rows.jobs_of(options, 0.1)} | {
        "teacher_seed0", *(f"lr_{lr:g}_seed{rows.LR_SEED}" for lr in options.lrs)
    }  # fmt: skip
    # Only what failed was run twice.
    assert {name for name, count in calls.items() if count > 1} == {"shared_BatchNorm_seed0"}
    table = (options.output / "study.md").read_text()
    assert "Learning rate 0.1, by top-1 % of an individual network (0.02: 59.92" in table
    assert "| private + ens_topdown " in table
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


def test_a_run_with_other_options_is_not_taken_for_one_of_the_study(options):
    job = next(rows.jobs_of(options, 0.1))
    options.output.mkdir()
    run = dataclasses.asdict(_summary(0, {"32": 1.0}, options.output)) | {"path": None}
    text = json.dumps({"options": "--epochs 9", "run": run})
    (options.output / f"{job.name}.json").write_text(text)
    with pytest.raises(
        UsageError, match=r"is of a run with --epochs 9; this study has .*--epochs 60"
    ):
        study.run(options)

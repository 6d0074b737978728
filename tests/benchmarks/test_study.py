"""The study's runs: what they are, that they are not run twice, and what is made of them."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from benchmarks import study
from pipelines.dali import DaliOptions
from pipelines.utils.errors import DataError, UsageError
from rsnet.config.command_line import parse


@pytest.fixture
def options(photos, tmp_path):
    return study.Options(photos, tmp_path / "study", sizes=(32, 24, 16), seeds=2)


@pytest.mark.slow
def test_every_run_is_a_command_of_train_dali(options):
    configs = {job.path: parse(DaliOptions, job.options)[0] for job in study.jobs_of(options)}
    kinds = {(c.kd, c.kd_type, c.norm, c.sizes, c.sizes_per_step, c.seed) for c in configs.values()}
    assert len(kinds) == len(configs) == 2 * (3 + 4 + 2)  # networks of one size; kinds; K = 2, 3
    assert {c.seed for c in configs.values()} == {0, 1}
    assert sum(c.norm == "shared" for c in configs.values()) == 2
    assert {path: c.output for path, c in configs.items()} == {path: path for path in configs}


def test_whole_seeds_come_first(options):
    seeds = [int(job.options[job.options.index("--seed") + 1]) for job in study.jobs_of(options)]
    assert seeds == sorted(seeds)


def test_a_run_with_other_options_is_not_taken_for_one_of_the_study(options, photos):
    job = next(study.jobs_of(options))
    study.claim(job)
    elsewhere = dataclasses.replace(options, data=photos.parent, workers=7)
    study.claim(next(study.jobs_of(elsewhere)))  # where it runs does not matter
    longer = dataclasses.replace(options, epochs=9)
    with pytest.raises(
        UsageError, match=r"networks_32/seed0 holds a run with .*--epochs 3 .*--epochs 9"
    ):
        study.claim(next(study.jobs_of(longer)))


def test_more_sizes_a_step_than_there_are_is_a_mistake(options):
    with pytest.raises(UsageError, match="--sizes-per-step 4: from 2 to the number of --sizes, 3"):
        study.run(dataclasses.replace(options, sizes_per_step=(2, 4)))
    assert not options.output.exists()


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_stopped(options, monkeypatch, capsys):
    """train_dali.py is played by a few lines that write a run's files, and fail once."""
    calls = options.output.parent / "calls"
    script = options.output.parent / "root" / "train_dali.py"
    script.parent.mkdir()
    script.write_text(
        f"import json, pathlib, sys\n"
        f"words = sys.argv\n"
        f"run = pathlib.Path(words[words.index('--output') + 1])\n"
        f"open({str(calls)!r}, 'a').write(str(run) + '\\n')\n"
        f"tried = pathlib.Path({str(calls)!r} + '.tried')\n"
        f"if 'shared' in str(run) and not tried.exists():\n"
        f"    tried.touch()\n"
        f"    sys.exit('the disk is full')\n"
        f"one = {{'top1': 50.0, 'top5': 90.0, 'loss': 1.0}}\n"
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
    with pytest.raises(DataError, match=r"shared_BN/seed0/run\.log: the disk is full"):
        study.run(options)
    first = calls.read_text().splitlines()
    assert study.run(options) == 0
    everything = calls.read_text().splitlines()
    # Only what failed was run twice.
    again = [run for run in set(everything) if everything.count(run) > 1]
    assert len(everything) == len(list(study.jobs_of(options))) + len(again)
    assert all("shared" in run for run in again)
    assert len(first) < len(everything)
    table = (options.output / "study.md").read_text()
    assert "individual networks" in table
    assert "50.00 ± 0.00" in table
    assert (options.output / "study.png").exists()
    assert "study: 40/40" in capsys.readouterr().out
    assert json.loads((options.output / "K_=_2" / "seed1" / "config.json").read_text())["seed"] == 1

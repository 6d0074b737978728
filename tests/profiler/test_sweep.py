"""The sweep: what is slow loses, what does not fit is passed over, and it ends in time with a command."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from dataclasses import dataclass

import pytest
import torch

from pipelines.dali import DaliOptions
from pipelines.ffcv import FfcvOptions
from pipelines.synthetic import SyntheticOptions
from pipelines.synthetic import make_loaders as make_synthetic
from pipelines.utils.errors import UsageError
from rsnet.config.command_line import parse
from rsnet.profiler import run as profile_run
from rsnet.profiler import step_profiler as profile
from rsnet.profiler.sweep import _candidates, names_of
from rsnet.train import main
from tests.helpers.clock import SlowLoader

STEPS = 2
BATCHES_OF_A_TRIAL = 1 + 2 * (3 + STEPS)  # the loader's: alone and together, the first one twice


@dataclass(frozen=True)
class PacedOptions:
    """Loaders whose pace a test sets."""

    workers: int = 4
    prefetch: int = 2
    decoder_hw_load: float = 0.65


class Backend:
    """Makes loaders that take `pause(options, spec)` seconds a batch; knows which are open."""

    def __init__(self, clock):
        self.clock = clock
        self.pause = lambda _options, _spec: 0.1
        self.opened: list[SlowLoader] = []
        self.most_open = 0
        self.open: set[SlowLoader] = set()

    def make_loaders(self, options, spec, with_train):
        synthetic = SyntheticOptions(train_images=64, val_images=4, classes=3)
        made = make_synthetic(synthetic, spec, with_train)
        train = SlowLoader(made.train, self.clock, self.pause(options, spec))
        train.close = lambda: self.open.discard(train)
        self.opened.append(train)
        self.open.add(train)
        self.most_open = max(self.most_open, len(self.open))
        return made._replace(train=train)


@pytest.fixture
def backend(clock):
    return Backend(clock)


@pytest.fixture
def sweep(backend, tmp_path, monkeypatch, capsys):
    """Run a sweep on 8 cores; returns what was said, and sweep.json."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(profile, "measure_peak_tflops", lambda *_: 1.0)  # half of a trial's time
    # The trace and the plot are of the first profile, which test_step_profiler looks at.
    for name in ("_trace", "_plot"):
        monkeypatch.setattr(profile_run, name, lambda *_: None)
    line = "--data d --arch parallel_resnet10 --width-mult 0.125 --stem small --sizes 32 24 -b 8"
    words = [*line.split(), "--device", "cpu", "--output", str(tmp_path / "run")]

    def run(names: str, *more: str, code: int = 0):
        steps = ["--profile-steps", str(STEPS), "--profile-sweep", names]
        monkeypatch.setattr(sys, "argv", ["train_dali.py", *words, *steps, *more])
        assert main("train_dali.py", PacedOptions, backend.make_loaders) == code
        found = json.loads((tmp_path / "run" / "profile" / "sweep.json").read_text())
        return capsys.readouterr().out.splitlines(), found

    return run


def _tried(found):
    return [(t["option"], t["value"], t["kept"]) for t in found["trials"][1:]]


def _parsed(command: str):
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "train_dali.py")
    return parse(PacedOptions, words)


def test_what_is_slow_loses_and_what_is_fast_is_kept(sweep, backend):
    backend.pause = lambda options, _: (
        {1: 0.1, 2: 0.05, 4: 0.2, 8: 0.4}[options.workers] / (options.prefetch)
    )
    said, found = sweep("workers,prefetch")
    assert _tried(found) == [
        ("workers", 8, False),
        ("workers", 2, True),
        ("workers", 1, False),
        ("prefetch", 4, True),
        ("prefetch", 8, True),
    ]
    speeds = [t["images_per_s"]["loader"] for t in found["trials"]]
    assert speeds == pytest.approx([80, 40, 320, 160, 640, 1280], rel=0.01)
    config, options = _parsed(found["command"])
    assert options == PacedOptions(workers=2, prefetch=8)
    assert not config.is_profile
    assert "profile" not in found["command"]
    assert found["command"] in said
    assert any(re.fullmatch(r"best, 1[56]\.\d\d times as many .* as given:", s) for s in said)


@pytest.mark.slow
def test_nothing_changes_for_less_than_the_spread(sweep, backend):
    backend.pause = lambda options, _: 0.1 - 0.0001 * options.workers
    said, found = sweep("workers")
    assert _tried(found) == [("workers", 8, False), ("workers", 2, False)]
    assert _parsed(found["command"])[1] == PacedOptions()
    assert "nothing was faster than the command as given:" in said


@pytest.mark.slow
def test_loaders_are_closed_before_the_next_are_opened(sweep, backend):
    sweep("workers")
    assert len(backend.opened) == 3
    assert backend.most_open == 1
    assert not backend.open


@pytest.mark.slow
def test_too_large_a_batch_does_not_end_the_sweep(sweep, backend):
    def pause(_, spec):
        if spec.batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TB")
        return 0.1 * spec.batch_size

    backend.pause = pause
    said, found = sweep("batch-size,prefetch")
    assert [t["failure"] for t in found["trials"]][1:] == ["out of memory", *[None] * 3]
    assert _tried(found)[0] == ("batch-size", 16, False)
    assert found["trials"][-1]["option"] == "prefetch"
    assert any(line.split()[-3:] == ["out", "of", "memory"] for line in said)


@pytest.mark.slow
def test_more_images_than_there_are_do_not_end_the_sweep(sweep):
    said, found = sweep("batch-size", "-b", "64")
    assert found["trials"][1]["failure"].startswith("--batch-size: one step takes 128 images")
    assert "--batch-size" in said[-2]


@pytest.mark.slow
def test_a_smaller_batch_keeps_the_images_of_an_update(sweep, backend):
    backend.pause = lambda _, spec: 0.01 * spec.batch_size**2
    said, found = sweep("batch-size", "--accumulate", "2")
    assert _tried(found) == [
        ("batch-size", 16, False),
        ("batch-size", 4, True),
        ("batch-size", 2, True),
    ]
    assert [t["accumulate"] for t in found["trials"]] == [2, 1, 4, 8]
    config, _ = _parsed(found["command"])
    assert (config.batch_size, config.accumulate) == (2, 8)
    assert config.lr == pytest.approx(0.1 * 16 / 256)
    assert not any("another recipe" in line for line in said)


@pytest.mark.slow
def test_a_larger_batch_says_that_it_is_another_recipe(sweep, backend):
    backend.pause = lambda *_: 0.1
    said, found = sweep("batch-size")
    config, _ = _parsed(found["command"])
    assert (config.batch_size, config.accumulate) == (32, 1)
    assert config.lr == pytest.approx(0.1 * 32 / 256)
    note = "this changes the recipe: 32 images an update instead of 8, --lr 0.0125 instead of 0.003125; "
    assert any(line.startswith(note) for line in said)


def test_the_limit_ends_the_sweep_within_a_trial(sweep, backend):
    pause = 0.1
    backend.pause = lambda *_: pause
    trial = BATCHES_OF_A_TRIAL * pause
    marks = []
    made = backend.make_loaders

    def make_loaders(*arguments):
        marks.append(backend.clock.now)
        return made(*arguments)

    backend.make_loaders = make_loaders
    limit = 1.5 * trial
    said, found = sweep("workers,batch-size", "--profile-limit", str(limit))
    assert _tried(found) == [("workers", 8, False)]
    assert found["not_tried"] == ["--workers 2", "--batch-size 16", "--batch-size 4"]
    assert len(marks) == 3  # those that were not tried were not opened
    assert backend.clock.now - marks[1] < limit + 2 * pause
    assert f"because --profile-limit {limit:g} is over: --workers 2, --batch-size 16" in "".join(
        said
    )
    assert _parsed(found["command"])[1] == PacedOptions()


@pytest.mark.slow
def test_ctrl_c_keeps_the_trials_and_prints_the_best_so_far(sweep, backend):
    def pause(options, _):
        if options.workers == 1:
            raise KeyboardInterrupt
        return {4: 0.1, 8: 0.2, 2: 0.05}[options.workers]

    backend.pause = pause
    said, found = sweep("workers,batch-size", code=130)
    assert _tried(found) == [("workers", 8, False), ("workers", 2, True)]
    assert _parsed(found["command"])[1] == PacedOptions(workers=2)
    assert found["command"] in said


def test_a_decoder_that_is_not_there_is_left_out(sweep):
    said, found = sweep("decoder-hw-load")
    assert _tried(found) == []
    assert "--decoder-hw-load: not tried, it is of a GPU's JPEG engine" in said


@pytest.mark.parametrize(
    ("text", "options", "world_size", "message"),
    [
        ("workers,colour", DaliOptions(), 1, "--profile-sweep workers,colour: 'colour' is none of workers,"),
        ("", DaliOptions(), 1, "'' is none of workers, prefetch, decoder-hw-load, batch-size"),
        ("decoder-hw-load", FfcvOptions(), 1, "is none of workers, prefetch, batch-size"),
        ("workers", SyntheticOptions(), 1, "'workers' is none of batch-size"),
        ("workers", DaliOptions(), 2, "--profile-sweep workers: it tries one process alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_is_one_line(text, options, world_size, message):
    with pytest.raises(UsageError) as error:
        names_of(text, options, world_size)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "device", "cores", "candidates"),
    [
        ("workers", 4, "cpu", 12, ([8, 12], [2, 1])),
        ("workers", 4, "cpu", 2, ([], [2, 1])),
        ("workers", 1, "cpu", 1, ([], [])),
        ("prefetch", 3, "cpu", 2, ([4, 8], [2, 1])),
        ("decoder-hw-load", 0.65, "cuda", 2, ([0.75, 1.0], [0.5, 0.25, 0.0])),
        ("batch-size", 4, "cpu", 2, ([8, 16], [2])),
        ("batch-size", 256, "cuda", 2, ([512 << n for n in range(8)], [128, 64])),
    ],
)
def test_values_lie_around_the_present_one(name, value, device, cores, candidates):
    assert _candidates(name, value, device, cores) == candidates

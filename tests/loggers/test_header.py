"""What a run says at its start."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from pipelines import synthetic
from pipelines.synthetic import SyntheticOptions
from rsnet.config.command_line import parse
from rsnet.config.resolve import resolve
from rsnet.loggers import header, run_context
from rsnet.loggers.console import ConsoleLogger
from rsnet.loggers.header import warn_of_schedule
from rsnet.loggers.run_context import RunContext
from rsnet.models import shapes
from tests.helpers import synthetic_run


def _context(*words: str) -> RunContext:
    config, options = parse(SyntheticOptions, ["--data", "imagenet", *words])
    none: Any = None
    return RunContext(
        script="rsnet train",
        config=resolve(config, world_size=1, device_type="cuda", has_bf16=True),
        options=options,
        network=none,
        model=none,
        loaders=none,
        device=torch.device("cpu"),
        console=ConsoleLogger(True),
    )


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("", ""),
        ("--arch parallel_mobilenetv2 --batch-size 64 --accumulate 2 --output o --amp off", ""),
        ("--recipe short", "--recipe short"),
        ("--recipe short --epochs 16", "--recipe short --epochs 16"),
        ("--epochs 120 --lr 0.1 --decay all --warmup 0 --sizes 96 128 160 192 224", ""),
        ("--lr 0.2 --no-kd --batch-size 64", "--lr 0.2 --no-kd"),
        ("--qw 2 --sizes 64 32 --warmup 3", "--sizes 64 32 --qw 2 --warmup 3"),
        ("--on-nonfinite skip 10 --classes 7", "--on-nonfinite skip 10 --classes 7"),
        ("--pretrained 'a b' --seed 0", "--pretrained 'a b'"),
    ],
)
def test_options_are_shown_where_they_are_not_the_recipes(words, shown, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    given = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", words)]
    assert _context(*given).changed_options() == shown


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (
            "--epochs 2 --warmup 5 --lr 1",
            "note: the learning rate only rises, to 0.4 of 1: --warmup 5 is not below --epochs 2\n",
        ),
        ("--epochs 6 --warmup 5", ""),
        (
            "--layer-decay 0.7",
            "note: --layer-decay 0.7 without --pretrained: the first layers, which have everything to learn, "
            "learn the least\n",
        ),
        ("--layer-decay 0.7 --pretrained default", ""),
        (
            "--epochs 30 --lr-decay schedule --lr 1",
            "note: the learning rate stays at 1: --epochs 30 end before --schedule's first, 30\n",
        ),
    ],
)
def test_a_learning_rate_that_is_hardly_meant_is_said(words, note, capsys):
    warn_of_schedule(_context(*words.split()))
    assert capsys.readouterr().out == note


def test_an_order_that_is_not_the_usual_one_is_shown():
    def data(order: str) -> str:
        loader = mock.Mock(state_dict=lambda: {"samples": 23, "order": order})
        config = SimpleNamespace(data="shards")
        return header._data(SimpleNamespace(config=config, loaders=(loader, loader, ["ant"])))

    plain = "shards: 23 images to train on, 23 to validate on, 1 classes"
    assert data("random") == plain
    assert data("shards, 2 of 3 at a time (ab)") == f"{plain}; order shards, 2 of 3 at a time (ab)"


@pytest.mark.parametrize(
    ("words", "shown", "teacher_share"),
    [
        # 4 and a mean of 1.5, of 7; a backward is twice a forward: 2.1 of 3 * 5.5
        ("--sizes-per-step 2", "train 32 and 1 of 24 16; 79 %", 13),
        (
            "--epochs 2 --size-schedule 0:24,16 1:all",
            "train 24 16 up to epoch 1, then 32 24 16; 71 %",  # 3 and 7, of 14
            14,  # 2.1 of 3 * 5
        ),
    ],
)
def test_the_sizes_of_the_steps_are_shown_with_their_share_of_the_operations(
    words, shown, teacher_share, monkeypatch
):
    counted = []

    def count(_model, sizes):
        counted.append(sizes)
        return [4.0, 2.0, 1.0]

    for module in (shapes, run_context):
        monkeypatch.setattr(module, "all_gmacs", count)
    model: Any = SimpleNamespace(sizes=(32, 24, 16), count_parameters=lambda: (1, 1))
    teacher: Any = SimpleNamespace(sizes=(64,), gmacs=2.1, megabytes=1.0)
    context = _context("--sizes", "32", "24", "16", *words.split())
    context = dataclasses.replace(context, model=model, teacher=teacher)
    assert header._steps(context) == f"{shown} of the operations of all sizes in each step"
    assert f"{teacher_share} % of a step's" in header._teacher(teacher, context)
    assert "GMACs 4 at 32, 2 at 24, 1 at 16" in header._network(context)
    assert counted == [(32, 24, 16)]  # once for all lines


def test_a_training_begins_with_what_differs_and_what_is_trained_where_on_what(tmp_path, capsys):
    run = tmp_path / "run"
    synthetic_run.train(run, "--epochs", "1", "--lr", "0.01")
    out = capsys.readouterr().out
    header = out[: out.index("W&B: ")].splitlines()
    expected = [
        r"options       --sizes 16 8 --width-mult 0\.125 --stem small --lr 0\.01 --epochs 1 "
        r"--train-images 32 --val-images 8 --classes 3",
        r"network       parallel_resnet10: [\d.]+ k parameters, [\d.]+ k of them private to sizes; GMACs "
        r"[\d.]+ at 16, [\d.]+ at 8",
        r"data          \.: 32 images to train on, 8 to validate on, 3 classes",
        r"device        CPU with \d+ cores, float32",
        r"global batch  4 = 4 images x 1 processes x 1 accumulated; 8 steps an epoch",
        rf"run           {run}",
    ]
    assert len(header) == len(expected)
    for line, pattern in zip(header, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert "global batch  4" in (run / "log.txt").read_text()
    assert "--no-blurpool" in (run / "command.txt").read_text()


def test_what_libraries_print_is_in_the_run_directory_and_not_on_the_console(
    tmp_path, monkeypatch, capfd
):
    make = synthetic.make_loaders

    def chatty(*arguments):
        os.write(1, b"[dali] USDT\n")
        os.write(2, b"nvml error (999): gpuGetDeviceCount\n")
        warnings.warn("an operator is deprecated", stacklevel=1)
        return make(*arguments)

    monkeypatch.setattr(synthetic, "make_loaders", chatty)
    run = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        synthetic_run.train(run, "--epochs", "1")
    out, err = capfd.readouterr()
    assert "global batch" in out
    assert err == ""
    assert not any(word in out for word in ("USDT", "gpuGetDeviceCount", "deprecated"))
    first, second, third, _ = (run / "libraries.log").read_text().splitlines()
    assert (first, second) == ("[dali] USDT", "nvml error (999): gpuGetDeviceCount")
    assert third.endswith("UserWarning: an operator is deprecated")


def test_an_evaluation_says_what_is_evaluated(tmp_path, capsys):
    run = tmp_path / "run"
    synthetic_run.train(run, "--epochs", "1")
    capsys.readouterr()
    synthetic_run.train(run, "--evaluate", "--resume", str(run / "checkpoints" / "best.pt"))
    out = capsys.readouterr().out
    first, *header = out.splitlines()
    assert first.startswith("--resume: checkpoint ")
    assert [line.split("  ")[0] for line in header[:4]] == ["options", "network", "data", "device"]
    assert "8 to validate on" in out

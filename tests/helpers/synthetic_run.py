"""Trainings of a tiny network on synthetic images in this process."""

from __future__ import annotations

from pathlib import Path

from pipelines import synthetic
from rsnet import train as training

OPTIONS = [
    "--data", ".", "--arch", "parallel_resnet10", "--width-mult", "0.125", "--sizes", "16", "8",
    "--stem", "small", "--batch-size", "4", "--device", "cpu", "--amp", "off", "--wandb", "disabled",
    "--train-images", "32", "--val-images", "8", "--classes", "3",
]  # fmt: skip


def train(output: Path, *more: str, code: int = 0) -> None:
    """Train as a command does, 8 updates an epoch."""
    words = [*OPTIONS, "--output", str(output), *more]
    options, make_loaders = synthetic.SyntheticOptions, synthetic.make_loaders
    assert training.main("rsnet train", options, make_loaders, words) == code

"""`rsnet train`: train by the pipeline that reads the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines import dali, ffcv
from pipelines.utils.cli import exit_with_help, expand_home
from pipelines.utils.config_file import read_config, split_config
from rsnet.cli.loaders import has_beton
from rsnet.config.train_config import TrainConfig

NAME = "rsnet train"

Pipeline = Literal["dali", "ffcv"]


@dataclass(frozen=True)
class DaliTrainOptions(dali.DaliOptions):
    """Reading with DALI."""

    pipeline: Pipeline = "dali"
    """Pipeline that reads --data: dali an image folder, ffcv .beton files. Unset: ffcv if there are any.
    Each has options of its own: add --pipeline ffcv to --help for the other's."""


@dataclass(frozen=True)
class FfcvTrainOptions(ffcv.FfcvOptions):
    """Reading with FFCV."""

    pipeline: Pipeline = "ffcv"
    """Pipeline that reads --data: dali an image folder, ffcv .beton files. Unset: ffcv if there are any.
    Each has options of its own: add --pipeline dali to --help for the other's."""


def run(words: Sequence[str]) -> int:
    """Run `rsnet train` with these arguments and return the exit code."""
    words = expand_home(words)
    given, path = split_config(words)
    config = {} if path is None else read_config(path)
    data = _last_value(given, "--data", "-d") or config.get("data")
    pipeline = _last_value(given, "--pipeline")
    if pipeline is None and data is not None and has_beton(Path(*expand_home([str(data)]))):
        pipeline = "ffcv"
    pipeline = pipeline or config.get("pipeline")
    options: Any = FfcvTrainOptions if pipeline == "ffcv" else DaliTrainOptions
    exit_with_help(words, NAME, [TrainConfig, options])
    return main(NAME, options, (ffcv if pipeline == "ffcv" else dali).make_loaders, words)


def main(*given: Any) -> int:
    """Call `rsnet.train.main`, which imports torch, as --help does not need it."""
    from rsnet.train import main as train

    return train(*given)


def _last_value(words: Sequence[str], *flags: str) -> str | None:
    """Return the value of an option as the parser will see it: the last one wins; None without it."""
    value = None
    for i, word in enumerate(words):
        name, equals, attached = word.partition("=")
        if name in flags and equals:
            value = attached
        elif word[:2] in flags and len(word) > 2:  # as in -d/imagenet
            value = word[2:]
        elif name in flags and i + 1 < len(words):
            value = words[i + 1]
    return value

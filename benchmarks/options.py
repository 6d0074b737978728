"""The command lines of benchmarks: what they are given is checked before anything is measured."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipelines.utils import cli
from pipelines.utils.errors import UsageError
from pipelines.utils.output import say
from rsnet.config.train_config import TrainConfig

Options = TypeVar("Options")

LEAST = "least"
OF_TRAINING = ("sizes", "batch_size")  # which a training checks


def at_least(least: int, default: int) -> Any:
    """Return a field of a benchmark's options, a number that is no smaller; all others are above 0."""
    return dataclasses.field(default=default, metadata={LEAST: least})


def command(
    name: str,
    options_type: type[Options],
    run: Callable[[Options], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Run the command line of a benchmark and return the exit code, see `pipelines.utils.cli.command`."""

    def checked(options: Options) -> int:
        require_valid(options)
        # `timeout` and schedulers end it as Ctrl-C does, with the processes that it started.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return run(options)
        finally:
            signal.signal(signal.SIGTERM, before)

    return cli.command(f"benchmarks.{name}", options_type, checked, argv)


def note(what: str, found: Any) -> None:
    """Print on stderr what is known by now: a benchmark that is ended early has printed nothing else."""
    say(f"{what}: {json.dumps(found)}", sys.stderr)


def require_valid(options: Any) -> None:
    """Raise UsageError for the first number of a benchmark's options with which nothing can be measured."""
    given = vars(options)
    TrainConfig(data=".", **{name: given[name] for name in OF_TRAINING if name in given})
    for field in dataclasses.fields(options):
        if field.name in OF_TRAINING:
            continue
        value = given[field.name]
        flag = "--" + field.name.replace("_", "-")
        for number in value if isinstance(value, tuple) else (value,):
            least = field.metadata.get(LEAST, 1)
            if type(number) is int and number < least:
                raise UsageError(f"{flag} {number}: at least {least}")
            if type(number) is float and not number > 0:
                raise UsageError(f"{flag} {number:g}: must be a positive number")


def require_beton(folder: Path, splits: Sequence[str] = ("train", "val")) -> None:
    """Raise UsageError if a folder of --beton lacks the file of one of these splits."""
    for split in splits:
        if not (file := folder / f"{split}.beton").is_file():
            raise UsageError(f"--beton: there is no file {file}; rsnet convert makes it")

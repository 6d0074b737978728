"""The command line: in, as checked dataclasses, and out, as the command that sets them."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Container, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from pipelines.utils.cli import parse_options
from rsnet.config.train_config import TrainConfig

Options = TypeVar("Options")


def parse(
    options_type: type[Options], argv: Sequence[str] | None = None
) -> tuple[TrainConfig, Options]:
    """The command line as a `TrainConfig` and the backend's own options.

    Raises UsageError, in one line, for what is mistyped; prints the help and exits for --help.
    """
    groups: dict[str, Any] = {"train": TrainConfig, "loader": options_type}
    both_types = dataclasses.make_dataclass(
        "Both",
        [(name, Annotated[group, tyro.conf.OmitArgPrefixes]) for name, group in groups.items()],
    )
    both_types.__doc__ = TrainConfig.__doc__
    both: Any = parse_options(both_types, list(groups.values()), argv)
    return both.train, both.loader


def as_command(script: str, *options: Any, without: Container[str] = ()) -> str:
    """The command line that sets every field of the `options` dataclasses but those of these names."""
    words = ["python", script] if script.endswith(".py") else script.split()
    for group in options:
        for field in dataclasses.fields(group):
            if field.name in without:
                continue
            flag, value = "--" + field.name.replace("_", "-"), getattr(group, field.name)
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, tuple):
                words += [flag, *map(str, value)]
            elif value is not None:
                words += [flag, str(value)]
    return shlex.join(words)

"""The command line: in, as checked dataclasses, and out, as the command that sets them."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import sys
from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from pipelines.utils.cli import exit_with_help, parse_options, with_config
from pipelines.utils.config_file import NO
from pipelines.utils.errors import UsageError
from pipelines.utils.output import say
from rsnet.config.recipes import FORMER_NAMES
from rsnet.config.resolve import OF_A_RECIPE, of_its_own
from rsnet.config.train_config import TOPICS, TrainConfig

Options = TypeVar("Options")

# Flags that stand for an option with a value.
SHORTHANDS = {
    "--bce-loss": ("--loss", "bce"),
    "--norm-weight-decay": ("--decay", "all"),
    "--no-norm-weight-decay": ("--decay", "weights"),
    # tyro has no flags that may be unset.
    **{
        f"--{no}{name}": (f"--{name}={value}",)
        for name in ("balanced-sampling", "fixed-qa", "kd")
        for no, value in (("", True), ("no-", False))
    },
}

# Values by other names: the original's, and torchvision's.
DECAYS = {"cos": "cosine"}
AUGMENTATIONS = {"ta_wide": "trivial", "ra": "rand", "randaugment": "rand"}
OPTIMIZERS = {"momentum": "plain", "sgd_nesterov": "nesterov"}  # timm's, torchvision's
VALUES: dict[str, Mapping[str, str]] = {
    "--recipe": FORMER_NAMES,
    "--sgd": OPTIMIZERS, "--opt": OPTIMIZERS,
    "--lr-decay": DECAYS, "--sched": DECAYS,
    "--auto-augment": AUGMENTATIONS, "--aa": AUGMENTATIONS,
}  # fmt: skip


def parse(
    options_type: type[Options], argv: Sequence[str] | None = None, program: str = ""
) -> tuple[TrainConfig, Options]:
    """Return the command line as a `TrainConfig` and the pipeline's own options.

    Raises UsageError, in one line, for what is mistyped; prints the help and exits for --help.
    """
    own: Any = options_type
    sources = [TrainConfig, own]
    typed = list(sys.argv[1:] if argv is None else argv)
    words = _plain(typed)
    exit_with_help(words, program, sources)
    completed = _plain(with_config(words, sources, _ignored))
    for word in typed:
        name = word.removeprefix("--recipe=")
        if name in FORMER_NAMES:
            say(f"note: --recipe {name} is now --recipe {FORMER_NAMES[name]}", sys.stderr)
    parsed: Any = parse_options(_together(own), sources, completed, program)
    values: dict[str, Any] = {}
    for topic in TOPICS:
        values |= vars(getattr(parsed, topic))
    return TrainConfig(**values), parsed.pipeline


@functools.cache  # tyro reads a class that it knows in half the time
def _together(options_type: type[Any]) -> Any:
    """Return a class with a field for each topic, and one for the pipeline's own options."""
    groups: dict[str, Any] = {**TOPICS, "pipeline": options_type}
    fields = [(name, Annotated[kind, tyro.conf.OmitArgPrefixes]) for name, kind in groups.items()]
    together = dataclasses.make_dataclass("Together", fields)
    together.__doc__ = TrainConfig.__doc__
    return together


def _ignored(file: Mapping[str, Any], given: Mapping[str, str]) -> set[str]:
    """Return the options of a config file to ignore, because the command line replaces what they belong to
    (recipe, optimizer, sizes).

    A run's config.json has a value for every option, also for what was not given: the recipe's, and those of
    the optimizer and the sizes. What was written by hand holds.
    """
    # A training starts from it.
    left = {"pretrained"} if given.get("evaluate", NO) != NO else set()
    if not file.keys() >= OF_A_RECIPE:
        return left
    sizes = file.get("sizes")
    run = {
        **file,
        "opt": str(file.get("opt")),
        "sizes": sizes if isinstance(sizes, list) else [sizes],
    }
    opt: Any = OPTIMIZERS.get(given.get("opt", ""), given.get("opt"))
    recipe = FORMER_NAMES.get(given.get("recipe", ""), given.get("recipe"))
    left |= of_its_own(run, opt, recipe)
    if left & {"opt", "weight_decay"}:  # the optimizer, or the recipe that chose it, has both
        left |= {"lr", "weight_decay"}
    return left


def _plain(words: Sequence[str]) -> list[str]:
    """Return a command line without shorthands and the original's values."""
    words = [part for word in words for part in SHORTHANDS.get(word.replace("_", "-"), (word,))]
    return [_as_of_today(before, word) for before, word in zip(["", *words], words, strict=False)]


def _as_of_today(before: str, word: str) -> str:
    """Return a word of the command line, a value by another name as ours."""
    flag, equals, value = word.partition("=") if "=" in word else (before, "", word)
    values = VALUES.get(flag.replace("_", "-"), {})
    timms = re.match(r"rand-(?:.*-)?m(\d+)", value)
    if timms and values is AUGMENTATIONS:
        raise UsageError(
            f"{flag} {value}: timm's RandAugment has other operations and ranges; torchvision's at this "
            f"magnitude is --auto-augment rand --ra-magnitude {timms[1]}"
        )
    if value == "sgd" and values is OPTIMIZERS:
        raise UsageError(
            f"{flag} sgd: it has plain momentum in torchvision, and Nesterov's in timm; give plain or "
            "nesterov"
        )
    value = values.get(value, value)
    return f"{flag}={value}" if equals else value


def as_command(script: str, *options: Any, without: Container[str] = ()) -> str:
    """Return the command line that sets every field of the `options` dataclasses but those of these names."""
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

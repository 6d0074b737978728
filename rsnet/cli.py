"""The command line: in, as checked dataclasses, and out, as the command that sets them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro

from pipelines.errors import UsageError
from rsnet.config import TrainConfig

Options = TypeVar("Options")


def parse(
    options_type: type[Options], argv: Sequence[str] | None = None
) -> tuple[TrainConfig, Options]:
    """The command line as a `TrainConfig` and the backend's own options.

    Raises UsageError, in one line, for what is mistyped; prints the help and exits for --help.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    groups: dict[str, Any] = {"train": TrainConfig, "loader": options_type}
    both_types = dataclasses.make_dataclass(
        "Both",
        [(name, Annotated[group, tyro.conf.OmitArgPrefixes]) for name, group in groups.items()],
    )
    both_types.__doc__ = TrainConfig.__doc__
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            both: Any
            unknown: list[str]
            both, unknown = tyro.cli(both_types, args=arguments, return_unknown_args=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_message(complaint.getvalue())) from None
    _reject_unknown(unknown, (TrainConfig, options_type))
    return both.train, both.loader


def as_command(script: str, *options: Any) -> str:
    """The command line that sets every field of the `options` dataclasses."""
    words = ["python", script]
    for group in options:
        for field in dataclasses.fields(group):
            flag, value = "--" + field.name.replace("_", "-"), getattr(group, field.name)
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, tuple):
                words += [flag, *map(str, value)]
            elif value is not None:
                words += [flag, str(value)]
    return shlex.join(words)


def _reject_unknown(words: Sequence[str], groups: Sequence[Any]) -> None:
    """Raise UsageError for the first of the words that the parser had no use for."""
    if not words:
        return
    names = [f.name.replace("_", "-") for group in groups for f in dataclasses.fields(group)]
    word = next((w for w in words if w.startswith("-")), words[0])
    flag = word.split("=", 1)[0]
    known = [f"--{name}" for name in names]
    near = [k for k in known if k.startswith(flag) and len(flag) > 3]
    near = near or difflib.get_close_matches(flag, known, n=1)
    advice = f"did you mean {near[0]}?" if near else "--help lists all options"
    raise UsageError(f"{flag}: there is no such option; {advice}")


def _message(box: str) -> str:
    """The message in the box that tyro draws around an error, as one line."""
    lines = [re.sub(r"[│╭╮╰╯]", "", line).strip() for line in box.splitlines()]
    message: list[str] = []
    for line in lines[1:]:
        if not line or set(line) == {"─"}:
            break
        message.append(line)
    text = re.sub(r"^Error parsing \w+: (?=--)", "", " ".join(message))
    return f"{text} (--help lists all options)"

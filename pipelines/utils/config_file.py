"""`--config FILE`: options from a YAML or JSON file, for all that the command line does not give."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.utils.errors import UsageError, first_line
from pipelines.utils.synonyms import advice

FLAG, NO = "--config", "--no-"

Fields = Mapping[str, "dataclasses.Field[Any]"]
Ignored = Callable[[Mapping[str, Any], Mapping[str, str]], Collection[str]]


def split_config(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return a command line without `--config FILE`, and the file, the last one that is named."""
    rest, path = [], None
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name != FLAG:
            rest.append(word)
            continue
        path = value if equals else next(remaining, "")
        if not path:
            raise UsageError(f"{FLAG}: the value is empty")
    # Path's own raises RuntimeError for a user who does not exist.
    return rest, None if path is None else Path(os.path.expanduser(path))  # noqa: PTH111


def read_config(path: Path) -> dict[str, Any]:
    """Return the options in a file, as YAML or, by the suffix .json, JSON.

    Raises UsageError if there is no such file, or it is no mapping of names to values.
    """
    if not path.is_file():
        raise UsageError(f"{FLAG}: there is no file {path}")
    data = path.read_bytes()
    try:
        content = json.loads(data) if path.suffix == ".json" else _yaml(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{FLAG} {path}: it cannot be read ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{FLAG} {path}: give lines such as `epochs: 30`")
    return {str(name): value for name, value in content.items()}


def completed(
    words: Sequence[str],
    path: Path,
    fields: Fields,
    ignored: Ignored = lambda *_: (),
) -> list[str]:
    """Return a command line with the options in a file that it does not give itself.

    fields: of the command's options, by all names that these have on a command line.
    ignored: returns, of the options in the file and those that are given, by the names of their fields, which
    of the file's are not to be taken, as they belong to others that are given.

    Raises UsageError for an option that the command does not have, or a value that is none.
    """
    given = _given(words, fields)
    found, content = list(words), read_config(path)
    left = ignored({_field_name(n, fields): v for n, v in content.items()}, given)
    for name, value in content.items():
        flag = "--" + name.replace("_", "-")
        if flag not in fields:
            raise UsageError(
                f"{FLAG} {path}: {name}: there is no such option; {advice(flag, fields.keys())}"
            )
        if fields[flag].name not in {*given, *left} and value is not None:
            found += _words(flag, value, f"{FLAG} {path}: {name}")
    return found


def _given(words: Sequence[str], fields: Fields) -> dict[str, str]:
    """Return the options of a command line, by the names of their fields, with the first word of each; NO of
    one that is turned off.
    """
    found = {}
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if (flag := flag_of(word)) in fields:
            _, equals, value = word.partition("=")
            found[fields[flag].name] = NO if word.startswith(NO) else value if equals else after
    return found


def _field_name(name: str, fields: Fields) -> str:
    field = fields.get("--" + name.replace("_", "-"))
    return name if field is None else field.name


def flag_of(word: str) -> str:
    """Return the flag in a word of a command line, by its name with hyphens and without --no-."""
    name = word.split("=", 1)[0]
    if not name.startswith("--"):
        return name[:2]  # its value may be attached, as in -j8
    return name.replace("_", "-").replace("--no-", "--", 1)


def _words(flag: str, value: Any, where: str) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list) and all(_is_plain(one) for one in value):
        return [flag, *map(str, value)]
    if not _is_plain(value):
        raise UsageError(f"{where}: give a value, or a list of values")
    return [f"{flag}={value}"]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _yaml(data: bytes) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes true and false alone for booleans, as YAML 1.2 does: `amp: off` is a word."""

    is_bool = "tag:yaml.org,2002:bool"
    Loader.yaml_implicit_resolvers = {
        first: [one for one in resolvers if one[0] != is_bool]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(is_bool, re.compile("true|True|TRUE|false|False|FALSE"), [*"tTfF"])
    try:
        return yaml.load(data, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error

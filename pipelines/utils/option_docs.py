"""What the options of a command are, from their dataclass: for `--help` and for docs/options.md."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAMES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}

SWITCH = "switch"  # what an option takes that is on or off

# Columns of the names, and of a page of help.
INDENT, MAX_COLUMNS = 26, 110


@dataclass(frozen=True)
class OptionDoc:
    """An option, as users see it.

    names: its flag and its other names, or what stands for an argument. choices: all values, if they are
    few. values: what it takes otherwise. default: in words; "" if there is none. place: among the fields.
    """

    names: tuple[str, ...]
    choices: tuple[str, ...]
    values: str
    default: str
    is_required: bool
    meaning: str
    place: int = 0

    @property
    def is_positional(self) -> bool:
        """Whether it is an argument without a name."""
        return not self.names[0].startswith("-")

    @property
    def takes(self) -> str:
        """What follows the name on a command line; "" for a switch."""
        if self.is_positional or self.values == SWITCH:
            return ""
        return f"{{{','.join(self.choices)}}}" if self.choices else self.values


def topics(options: type[Any]) -> Iterator[tuple[str, list[OptionDoc]]]:
    """Yield (title, options) of each topic: the class's own fields, and each base's, by its docstring."""
    by_owner: dict[type[Any], list[OptionDoc]] = {}
    hints = typing.get_type_hints(options, include_extras=True)
    for place, field in enumerate(dataclasses.fields(options)):
        owner = next(
            c for c in reversed(options.__mro__) if field.name in vars(c).get("__annotations__", {})
        )
        by_owner.setdefault(owner, []).append(_option(owner, field, hints[field.name], place))
    for owner, found in sorted(by_owner.items(), key=lambda item: item[0] is not options):
        title = (inspect.getdoc(owner) or owner.__name__).splitlines()[0].rstrip(".")
        yield ("Options" if owner is options else title), found


def option_docs(options: type[Any]) -> list[OptionDoc]:
    """Return all options of a command, those without a name first."""
    found = [option for _, of_topic in topics(options) for option in of_topic]
    return [*_arguments(found), *(option for option in found if not option.is_positional)]


def flags(options: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields by all names that their options have on a command line."""
    hints = typing.get_type_hints(options, include_extras=True)
    found: dict[str, dataclasses.Field[Any]] = {}
    for field in dataclasses.fields(options):
        configs = getattr(hints[field.name], "__metadata__", ())
        if not _is_positional(configs):
            found |= dict.fromkeys((_flag(field), *_aliases(configs)), field)
    return found


def usage(program: str, options: Sequence[OptionDoc]) -> str:
    """Return a command with what it needs."""
    given = [o.names[0] if o.is_required else f"[{o.names[0]}]" for o in _arguments(options)]
    named = [o for o in options if o.is_required and not o.is_positional]
    return " ".join([program, *given, *(f"{o.names[0]} {o.takes}" for o in named), "[options]"])


def _arguments(options: Sequence[OptionDoc]) -> list[OptionDoc]:
    """Return what has no name, in the order of the command line: a class's own fields follow its bases'."""
    return sorted((o for o in options if o.is_positional), key=lambda option: option.place)


def help_page(program: str, about: str, groups: Mapping[str, Sequence[OptionDoc]]) -> str:
    """Return what `program --help` prints. about: what it does. groups: its options by topic."""
    options = [option for group in groups.values() for option in group]
    arguments = _arguments(options)
    width = min(shutil.get_terminal_size().columns, MAX_COLUMNS) - 1
    page = [f"usage: {usage(program, options)}", ""]
    for paragraph in about.split("\n\n"):
        is_set = paragraph.startswith(("    ", "- "))  # commands, and lists
        lines = paragraph.splitlines() if is_set else _wrapped(" ".join(paragraph.split()), width)
        page += [*lines, ""]
    if arguments:
        page += ["Arguments", *(_entry(option, width) for option in arguments), ""]
    for title, group in groups.items():
        if entries := [_entry(option, width) for option in group if not option.is_positional]:
            page += [title, *entries, ""]
    config = "Read options from a YAML or JSON file; the command line takes precedence."
    common = [
        _entry_of("--config FILE", config, width),
        _entry_of("-h, --help", "Show this help.", width),
    ]
    return "\n".join([*page, "Common options", *common])


def _entry(option: OptionDoc, width: int) -> str:
    short = sorted(option.names, key=lambda name: name.startswith("--"))
    names = ", ".join(short)
    if option.values == SWITCH and not option.is_positional:
        names += f", {option.names[0].replace('--', '--no-', 1)}"
    default = f" Default: {option.default}." if option.default else ""
    required = " Required." if option.is_required and not option.is_positional else ""
    text = f"{option.meaning}{default}{required}"
    return _entry_of(f"{names} {option.takes}".rstrip(), text, width)


def _entry_of(names: str, text: str, width: int) -> str:
    """Return names and text beside each other, or below each other if the names are long."""
    margin = " " * INDENT
    lines = _wrapped(text, max(width - INDENT, 20)) or [""]
    first = f"  {names}"
    if len(first) <= INDENT - 2:
        return "\n".join([f"{first:{INDENT}}{lines[0]}", *(margin + line for line in lines[1:])])
    return "\n".join([first, *(margin + line for line in lines)])


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)


def _option(owner: Any, field: dataclasses.Field[Any], hint: Any, place: int) -> OptionDoc:
    configs = getattr(hint, "__metadata__", ())
    metavar = next((c.metavar for c in configs if getattr(c, "metavar", None)), "")
    is_positional = _is_positional(configs)
    bare = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    meaning, _, unset = _docstrings(owner).get(field.name, "").partition("Unset: ")
    choices, values = _values(bare, "" if is_positional else metavar)
    return OptionDoc(
        names=(metavar or field.name,) if is_positional else (_flag(field), *_aliases(configs)),
        choices=choices,
        values=values,
        # The words of an option that is None if it is not given.
        default=unset.removesuffix(".") or _default(field),
        is_required=field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING,
        meaning=meaning.strip(),
        place=place,
    )


def _flag(field: dataclasses.Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def _aliases(configs: Sequence[Any]) -> list[str]:
    return [alias for config in configs for alias in (getattr(config, "aliases", None) or ())]


def _is_positional(configs: Sequence[Any]) -> bool:
    return "Positional" in str(configs)


def _values(hint: Any, metavar: str) -> tuple[tuple[str, ...], str]:
    """Return the choices, if there are some, and what an option takes, as a user would type it."""
    # `X | None`, or `X | Unset` of the training's options.
    unset = [k for k in typing.get_args(hint) if k is type(None) or isinstance(k, typing.TypeVar)]
    kinds = [k for k in typing.get_args(hint) if k not in unset]
    if unset and len(kinds) == 1:
        hint = kinds[0]
    if hint is bool:
        return (), SWITCH
    if typing.get_origin(hint) is typing.Literal:
        return tuple(map(str, typing.get_args(hint))), ""
    is_tuple = typing.get_origin(hint) is tuple
    choices, item = _values(typing.get_args(hint)[0], "") if is_tuple else ((), "")
    if choices:
        return choices, "one or more of"
    if metavar:
        return (), metavar
    return (), f"{item} [{item} ...]" if is_tuple else _NAMES.get(hint, str(hint))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "cores of this process"  # the only one that is computed
    if field.default in (dataclasses.MISSING, None, ()):
        return ""
    if isinstance(field.default, tuple):
        return " ".join(map(str, field.default))
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return str(field.default)


@functools.cache
def _docstrings(owner: type[Any]) -> Mapping[str, str]:
    """Return the strings that follow the fields in the source of their class, each as one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(body, ast.ClassDef)
    return {
        ast.unparse(statement.target): " ".join(str(following.value.value).split())
        for statement, following in itertools.pairwise(body.body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }

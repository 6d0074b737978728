"""Write docs/options.md from the dataclasses of the commands: python scripts/options_page.py [--check]."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "options.md"
HEADER = """# Options

Every command prints its options with `--help`. This page is generated from the same code by `make docs`.

- All names in the first column of a row are the same option: a short form, the name in the authors' code,
  or the name in timm and torchvision's references (`--opt`, `--sched`, `--model-ema-decay`, ...).
- `switch`: `--name` turns it on, `--no-name` off. `INT [INT ...]`: one or more values.
- An empty default means that the option is not used.
"""
_NAMES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
PROGRAMS = """`rsnet train`, `python train_dali.py` and `python train_ffcv.py` share these options.
`rsnet train` also has `--pipeline dali` or `ffcv`; by default FFCV reads a `--data` folder with .beton files,
and DALI any other. Defaults that depend on the recipe, the network or the device are described in words.
"""


def page() -> str:
    """Return the whole page."""
    from pipelines.__main__ import VERBS as PIPELINE_VERBS
    from pipelines.dali import DaliOptions
    from pipelines.ffcv import FfcvOptions
    from rsnet.__main__ import VERBS
    from rsnet.config.train_config import TrainConfig

    parts = [HEADER, "## Training\n", PROGRAMS]
    for title, rows in _groups(TrainConfig):
        parts += [f"### {title}\n", _table(rows)]
    parts += ["### Reading image folders with DALI\n", _table(_rows(DaliOptions))]
    parts += ["### Reading .beton files with FFCV\n", _table(_rows(FfcvOptions))]
    commands = {f"rsnet {name}": verb for name, verb in VERBS.items() if name != "train"}
    commands |= {
        f"python -m pipelines {name}": verb
        for name, verb in PIPELINE_VERBS.items()
        if name not in VERBS
    }
    for name, verb in commands.items():
        options = getattr(importlib.import_module(verb.module), verb.options)
        parts += [f"## {name}\n", inspect.getdoc(options) or "", "", _table(_rows(options))]
    return "\n".join(parts)


def _groups(options: type[Any]) -> Iterator[tuple[str, list[Sequence[str]]]]:
    """Yield (title, rows) of each topic: the options of a base class."""
    by_owner: dict[type[Any], list[Sequence[str]]] = {}
    hints = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        owner = next(
            c for c in reversed(options.__mro__) if field.name in vars(c).get("__annotations__", {})
        )
        by_owner.setdefault(owner, []).append(_row(owner, field, hints[field.name]))
    for owner, rows in by_owner.items():
        yield _title(owner), rows


def _title(owner: type[Any]) -> str:
    return (inspect.getdoc(owner) or owner.__name__).splitlines()[0].rstrip(".")


def _rows(options: type[Any]) -> list[Sequence[str]]:
    hints = typing.get_type_hints(options, include_extras=True)
    rows = []
    for field in dataclasses.fields(options):
        owner = next(
            c for c in reversed(options.__mro__) if field.name in vars(c).get("__annotations__", {})
        )
        rows.append(_row(owner, field, hints[field.name]))
    return sorted(rows, key=lambda row: row[0].startswith("`-"))  # positional arguments first


def _row(owner: type[Any], field: dataclasses.Field[Any], hint: Any) -> Sequence[str]:
    """Return (names, values, default, meaning)."""
    configs = getattr(hint, "__metadata__", ())
    flag = "--" + field.name.replace("_", "-")
    aliases = [a for c in configs for a in (getattr(c, "aliases", None) or ())]
    is_positional = "Positional" in str(configs)
    metavar = _metavar(configs)
    names = [metavar or field.name] if is_positional else [flag, *aliases]
    meaning, _, unset = _docstring(owner, field.name).partition("Unset: ")
    return (
        ", ".join(f"`{name}`" for name in names),
        _values(_without_annotated(hint), "" if is_positional else metavar),
        unset.removesuffix(".") or _default(field),  # of an option that is None if it is not given
        meaning.strip(),
    )


def _metavar(configs: Sequence[Any]) -> str:
    return next((c.metavar for c in configs if getattr(c, "metavar", None)), "")


def _without_annotated(hint: Any) -> Any:
    return hint.__origin__ if hasattr(hint, "__metadata__") else hint


def _values(hint: Any, metavar: str) -> str:
    """Return what an option takes, as a user would type it."""
    # `X | None`, or `X | Unset` of the training's options.
    unset = [k for k in typing.get_args(hint) if k is type(None) or isinstance(k, typing.TypeVar)]
    kinds = [k for k in typing.get_args(hint) if k not in unset]
    is_optional = bool(unset)
    if is_optional and len(kinds) == 1:
        hint = kinds[0]
    if hint is bool:
        return "switch"
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    is_tuple = typing.get_origin(hint) is tuple
    item = _values(typing.get_args(hint)[0], "") if is_tuple else ""
    if item.startswith("`"):
        return f"one or more of {item}"
    if metavar:
        return metavar
    return f"{item} [{item} ...]" if is_tuple else _NAMES.get(hint, str(hint))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "cores of this process"  # the only one that is computed
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None or field.default == ():
        return ""
    if isinstance(field.default, tuple):
        return " ".join(map(str, field.default))
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return str(field.default)


def _docstring(owner: type[Any], name: str) -> str:
    """Return the string that follows a field in the source of its class, as one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(body, ast.ClassDef)
    for statement, following in zip(body.body, body.body[1:], strict=False):
        is_field = isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == name
        if (
            is_field
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            return " ".join(str(following.value.value).split())
    return ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| option | values | default | meaning |", "|---|---|---|---|"]
    cells = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)]) + "\n"


if __name__ == "__main__":
    text = page()
    if sys.argv[1:] == ["--check"]:
        sys.exit(PAGE.read_text() != text and f"{PAGE} is not what the code says; run make docs")
    PAGE.write_text(text)

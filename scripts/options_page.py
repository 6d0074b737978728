"""Write docs/options.md from the dataclasses of the commands: python scripts/options_page.py [--check]."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pipelines.utils.option_docs import OptionDoc, option_docs, topics  # noqa: E402

PAGE = ROOT / "docs" / "options.md"
HEADER = """# Options

Every command prints its options with `--help`. This page is generated from the same code by `make docs`.

- All names in the first column of a row are the same option: a short form, the name in the authors' code,
  or the name in timm and torchvision's references (`--opt`, `--sched`, `--model-ema-decay`, ...).
- `switch`: `--name` turns it on, `--no-name` off. `INT [INT ...]`: one or more values.
- An empty default means that the option is not used.
- `--config FILE`, of every command, reads options from YAML or JSON, such as a run's `config.json`; the
  command line wins.
"""
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
    for title, options in topics(TrainConfig):
        parts += [f"### {title}\n", _table(options)]
    parts += ["### Reading image folders with DALI\n", _table(option_docs(DaliOptions))]
    parts += ["### Reading .beton files with FFCV\n", _table(option_docs(FfcvOptions))]
    commands = {f"rsnet {name}": verb for name, verb in VERBS.items() if name != "train"}
    commands |= {
        f"python -m pipelines {name}": verb
        for name, verb in PIPELINE_VERBS.items()
        if name not in VERBS
    }
    for name, verb in commands.items():
        kind = getattr(importlib.import_module(verb.module), verb.options)
        parts += [f"## {name}\n", inspect.getdoc(kind) or "", "", _table(option_docs(kind))]
    return "\n".join(parts)


def _row(option: OptionDoc) -> list[str]:
    choices = ", ".join(f"`{choice}`" for choice in option.choices)
    return [
        ", ".join(f"`{name}`" for name in option.names),
        f"{option.values} {choices}".strip(),
        "required" if option.is_required else option.default,
        option.meaning,
    ]


def _table(options: Iterable[OptionDoc]) -> str:
    lines = ["| option | values | default | meaning |", "|---|---|---|---|"]
    rows = map(_row, options)
    cells = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)]) + "\n"


if __name__ == "__main__":
    text = page()
    if sys.argv[1:] == ["--check"]:
        sys.exit(PAGE.read_text() != text and f"{PAGE} is not what the code says; run make docs")
    PAGE.write_text(text)

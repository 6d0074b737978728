"""Tables as plain text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table


def plain_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    first: Literal["left", "right"] = "right",
) -> str:
    """Return an aligned table without lines, two spaces between columns; numbers end below each other.

    first: how the first column is aligned.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=None)
    for i, name in enumerate(header):
        justify = first if i == 0 else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # A console of its own, wide enough that no line is cut.
    console = Console(file=io.StringIO(), width=10_000, color_system=None, markup=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())

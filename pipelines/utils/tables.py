"""Tables as plain text."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.utils.text import printable


def text_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = ()
) -> str:
    """Return aligned columns, two blanks apart. left: the columns aligned to the left, by index."""
    table = Table(box=None, pad_edge=False, header_style="")
    for i, name in enumerate(header):
        justify = "left" if i in left else "right"
        table.add_column(Text(name), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # As wide as need be: lines are for grep, too.
    console = Console(file=io.StringIO(), width=100_000, color_system=None)
    with console.capture() as capture:
        console.print(table, no_wrap=True)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())

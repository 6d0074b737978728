"""`rsnet report`: finished runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pipelines.utils.atomic_io import atomic_write
from pipelines.utils.errors import UsageError
from pipelines.utils.text import printable


@dataclass(frozen=True)
class Options:
    """Compare finished runs: results, the options that differ, and a plot of accuracy over GMACs."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN [RUN ...]")]]
    """Run directories, or checkpoints in them."""

    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder for report.md and report.png. Unset: none."""


def run(options: Options) -> int:
    from rsnet.evaluation.compare import differing_options, plot, read_run, tables
    from rsnet.loggers.run_dir import run_directory

    if not options.runs:
        raise UsageError("name one or more run directories")
    runs = map(run_directory, options.runs)
    groups = {printable(str(path)): [read_run(path)] for path in runs}
    text = tables(groups)
    differing = differing_options({label: found[0] for label, found in groups.items()})
    if len(groups) > 1:
        text += f"\n\n{differing or 'The runs have the same options.'}"
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        atomic_write(options.output / "report.md", f"{text}\n".encode())
        plot(options.output / "report.png", groups)
    return 0

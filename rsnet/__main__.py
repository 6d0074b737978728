"""`python -m rsnet VERB`: what is to be done with networks and runs besides training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pipelines.batch import Loaders, LoaderSpec
from pipelines.cli import command
from pipelines.errors import UsageError
from rsnet import calibrate, compare, convert, sync


def _loaders(spec: LoaderSpec, train: bool) -> Loaders:
    """Of .beton files, if --data has them, else of an image folder."""
    if any(spec.data.glob("*.beton")):
        from pipelines import ffcv

        return ffcv.make_loaders(ffcv.FfcvOptions(), spec, train)
    from pipelines import dali

    return dali.make_loaders(dali.DaliOptions(), spec, train)


VERBS: dict[str, tuple[Any, Callable[[Any], int], str]] = {
    "import": (convert.ImportOptions, convert.import_original, "a file of the original code"),
    "export": (convert.ExportOptions, convert.export_original, "a file for the original code"),
    "report": (compare.ReportOptions, compare.report, "table and plot of finished runs"),
    "calibrate": (
        calibrate.Options,
        lambda options: calibrate.run(options, _loaders),
        "a resolution that was not trained",
    ),
    "sync": (sync.Options, sync.run, "metrics that W&B lacks"),
}


def main(words: list[str]) -> int:
    verb, *rest = words or ["--help"]
    if verb in VERBS:
        options, run, _ = VERBS[verb]
        return command(f"rsnet {verb}", options, run, rest)
    lines = "\n".join(f"  {name:10} {what}" for name, (_, _, what) in VERBS.items())
    usage = f"python -m rsnet VERB --help\n{lines}"
    if verb in ("--help", "-h"):
        print(usage)
        return 0
    print(f"rsnet: error: {verb}: there is no such verb; one of {' '.join(VERBS)}", file=sys.stderr)
    return UsageError.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

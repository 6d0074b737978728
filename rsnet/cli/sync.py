"""`rsnet sync`: what W&B lacks of runs that were offline, or that lost it.

All of metrics.jsonl is sent, into the W&B run that the training had. One that is started again under its id,
and not resumed, is replaced: nothing is there twice, and what was logged while W&B was lost comes into its
place, also if the run was resumed since. W&B's own `wandb sync` does not do: of a run that was resumed
offline, each folder replaces the one before (https://github.com/wandb/wandb/issues/3841), and no folder has
what came after W&B's service had died.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pipelines.utils.errors import UsageError, error_context
from pipelines.utils.output import say


@dataclass(frozen=True)
class Options:
    """Send W&B the metrics that it lacks. RUN/wandb.json knows the W&B run; without it, a new one is made."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN [RUN ...]")]]
    """Run directories, or checkpoints in them."""


def run(options: Options) -> int:
    from rsnet.loggers.run_dir import run_directory
    from rsnet.loggers.wandb_sync import send_run

    if not options.runs:
        raise UsageError("name one or more run directories")
    for path in map(run_directory, options.runs):
        with error_context(str(path)):
            say(f"{path}: {send_run(path)}")
    return 0

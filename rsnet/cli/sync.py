"""`rsnet sync`: what W&B lacks of runs that were offline, or that lost it; and TensorBoard's files.

All of metrics.jsonl is sent, into the W&B run that the training had. One that is started again under its id,
and not resumed, is replaced: nothing is there twice, and what was logged while W&B was lost comes into its
place, also if the run was resumed since. W&B's own `wandb sync` does not do: of a run that was resumed
offline, each folder replaces the one before (https://github.com/wandb/wandb/issues/3841), and no folder has
what came after W&B's service had died. TensorBoard's event files are written anew from the same lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from pipelines.utils.errors import UsageError, error_context
from pipelines.utils.output import say


@dataclass(frozen=True)
class Options:
    """Send W&B the metrics that it lacks, and write TensorBoard's files anew.

    RUN/wandb.json knows the W&B run; without it, a new one is made."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN [RUN ...]")]]
    """Run directories, or checkpoints in them."""

    only: Annotated[Literal["wandb", "tensorboard"] | None, arg(metavar="{wandb,tensorboard}")] = (
        None
    )
    """One of the two. Unset: W&B, and TensorBoard for runs that have its files."""


def run(options: Options) -> int:
    from rsnet.loggers import tensorboard_logger
    from rsnet.loggers.run_dir import run_directory

    if not options.runs:
        raise UsageError("name one or more run directories")
    for path in map(run_directory, options.runs):
        has_events = (path / tensorboard_logger.FOLDER).is_dir()
        if options.only == "tensorboard" or (options.only is None and has_events):
            with error_context(str(path)):
                lines = tensorboard_logger.rewrite(path)
            say(f"{path}: {lines} lines of metrics written for TensorBoard")
        if options.only != "tensorboard":
            from rsnet.loggers.wandb_sync import send_run

            with error_context(str(path)):
                say(f"{path}: {send_run(path)}")
    return 0

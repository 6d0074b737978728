"""A table and a plot in a W&B run of their own, for the verbs that measure."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from pipelines.utils.output import say


def require_wandb(options: Any) -> None:
    """Raise ModuleNotFoundError now, before hours of work, if W&B is asked for and not installed."""
    if options.wandb != "disabled":
        importlib.import_module("rsnet.loggers.wandb_logger")


def log_table(
    options: Any,
    config: dict[str, Any],
    columns: list[str | int],
    rows: list[list[Any]],
    plot: Path | None,
) -> None:
    """Log a table and a plot, if a verb's options ask for it. config: of the W&B run.

    options: with output, wandb, wandb_project and wandb_name.
    """
    if options.wandb == "disabled" or options.output is None:
        return
    from rsnet.config.resolve import wandb_project
    from rsnet.loggers.wandb_logger import WandbLogger

    log = WandbLogger(
        options.wandb,
        options.output,
        project=options.wandb_project or wandb_project(),
        name=options.wandb_name or os.environ.get("WANDB_NAME") or None,
        config=config,
        run_id=None,
        say=lambda line: say(line, sys.stderr),
        remedy=f"all of it is in {options.output}",
    )
    log.log_results(columns, rows, plot)
    log.finish()

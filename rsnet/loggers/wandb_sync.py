"""Send the metrics of a run directory to W&B afterwards."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pipelines.utils.errors import DataError, UsageError, first_line
from pipelines.utils.schema import parsing, read_json
from rsnet.config.costs import require_gmacs
from rsnet.evaluation import report
from rsnet.loggers import wandb_service
from rsnet.loggers.run_dir import whole_metrics
from rsnet.loggers.wandb_logger import Sent, read_sent, write_sent
from rsnet.loggers.wandb_service import Console, Table

# All lines of a run at once, 12 MB for the paper's recipe; and now W&B is what the user waits for.
TIMEOUT_S = 600

_REMEDY = "its metrics cannot be sent"


def send_run(path: Path) -> str:
    """Send W&B the lines of metrics that it lacks of a run directory; return what was done, in words."""
    with parsing(path, _REMEDY):
        rows, config, table = _read(path)
    if not rows:
        raise UsageError("there are no metrics; is it the directory of a run?")
    sent = read_sent(path)
    if sent and sent.lines == len(rows):
        return f"W&B has all {len(rows)} lines of metrics"
    console = wandb_service.Console()
    mode, reason = wandb_service.choose_mode(None)
    if mode != "online":
        raise UsageError(
            f"W&B is {mode} ({reason}); unset WANDB_MODE, call `wandb login`, or set WANDB_API_KEY"
        )
    try:
        url = _send(path, rows, config, table, sent, console)
    except Exception as error:
        message = f"W&B did not take it ({first_line(error)}); the same command tries again"
        raise DataError(message) from error
    return f"{len(rows)} lines of metrics sent to {url}"


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any], Table | None]:
    """Return metrics, options, and the final table if the run is finished."""
    rows = whole_metrics(path / "metrics.jsonl", _REMEDY)
    if not rows:
        return [], {}, None
    config = read_json(path / "config.json", _REMEDY)
    world_size = read_json(path / "env.json", _REMEDY)["world_size"]
    config["global_batch"] = config["batch_size"] * world_size * config["accumulate"]
    config["wandb_name"] = config["wandb_name"] or path.resolve().name
    if not (path / "results.json").exists():
        return rows, config, None
    results = read_json(path / "results.json", _REMEDY)
    require_gmacs(results)
    gmacs = results.pop("gmacs")
    del results["parameters"]
    older = path / "accuracy_flops.png"  # as it was called before
    plot = older if older.exists() else path / "accuracy_gmacs.png"
    table = report.COLUMNS, report.rows(results, gmacs), plot
    return rows, config, table


def _send(
    path: Path,
    rows: list[dict[str, Any]],
    config: dict[str, Any],
    table: Table | None,
    sent: Sent | None,
    console: Console,
) -> str:
    """Replace the W&B run, or make one; return its address."""
    run = None
    try:
        with tempfile.TemporaryDirectory() as scratch:
            run = wandb_service.start(
                "online",
                Path(scratch),
                project=config["wandb_project"],
                name=config["wandb_name"],
                config=config,
                run_id=sent.id if sent else None,
                resume=None,
                entity=(sent.entity if sent else None) or config.get("wandb_entity"),
                tags=config.get("wandb_tags", ()),
                finish_timeout=TIMEOUT_S,
                x_disable_meta=True,  # it would be this machine's
                x_disable_stats=True,
            )
            write_sent(path, Sent(run.id, run.entity, 0))
            for row in rows:
                run.log({"_timestamp": row.pop("time"), **row})
            if table:
                wandb_service.log_results(run, *table)
            wandb_service.finish(run, console, failed=table is None)
        write_sent(path, Sent(run.id, run.entity, len(rows)))
        return str(run.url)
    finally:
        wandb_service.let_go(run)

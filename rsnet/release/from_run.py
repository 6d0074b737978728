"""Release the network of a run directory or a checkpoint.

Apart from `package`, as reading a release needs none of what reads checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from pipelines.utils.errors import error_context
from rsnet.checkpoint import io
from rsnet.checkpoint.authors_pytorch import assumed_sizes
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.checkpoint.weights import load_weights
from rsnet.losses import ENSEMBLE
from rsnet.models.factory import create_model, gflops
from rsnet.release import package
from rsnet.release.config import result_names

Accuracy = dict[str, dict[str, float]]


def release_run(
    run: str | Path, output: str | Path, say: Callable[[str], None] = lambda _: None
) -> package.Release:
    """Write the release `output` of a run's best checkpoint, or of a checkpoint, and return its content.

    The averaged weights are released where there are some. config.json has their accuracies if they are of
    a run directory whose metrics.jsonl has an evaluation of just these weights. say: is told which sizes are
    assumed of a file of the original code.

    Raises UsageError if there is no checkpoint, or something at `output`; DataError if a file is damaged.
    """
    path = checkpoint_of(run)
    checkpoint = io.load(path)
    config = checkpoint.network
    if checkpoint.of_authors:
        say(assumed_sizes(path, config, is_start=True))
    network = config.to_dict()
    with error_context(str(path)):
        model = create_model(config)
        load_weights(model, checkpoint.eval_weights, config.sizes)
    costs = {str(size): gflops(model, size) for size in model.sizes}
    run_dir = _run_dir(path)
    return package.write(
        output,
        network,
        model,
        gflops=costs | {ENSEMBLE: sum(costs.values())},
        accuracy=_accuracy(run_dir, checkpoint) if run_dir else None,
        averaged=checkpoint.ema is not None,
        source={
            "run": run_dir.name if run_dir else None,
            "checkpoint": path.name,
            "epoch": checkpoint.epoch,
        },
    )


def checkpoint_of(run: str | Path) -> Path:
    """Return the best checkpoint of a run directory, or the checkpoint itself."""
    path = Path(run)
    return path / "checkpoints" / "best.pt" if path.is_dir() else path


def _run_dir(path: Path) -> Path | None:
    folder = path.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def _accuracy(run_dir: Path, checkpoint: Checkpoint) -> Accuracy | None:
    """Return the run's evaluation of just these weights; None if there is none."""
    metrics = run_dir / "metrics.jsonl"
    if checkpoint.done or not metrics.is_file():
        return None
    for line in reversed(metrics.read_bytes().splitlines()):
        try:
            logged = json.loads(line)
            if logged["epoch"] == checkpoint.epoch:
                return {
                    name: {what: logged[f"val/{what}@{name}"] for what in ("top1", "top5")}
                    for name in result_names(checkpoint.network.to_dict())
                }
        except (
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ):  # cut short by a crash, or no evaluation
            continue
    return None

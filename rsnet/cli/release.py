"""`python -m rsnet release`: a run's network as a folder to publish and to load from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from pipelines.utils.errors import error_context
from rsnet.checkpoint import io
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.checkpoint.weights import load_weights
from rsnet.config.model_config import FULL
from rsnet.evaluation import report
from rsnet.models.factory import create_model, gflops
from rsnet.release import package as release
from rsnet.release.config import result_names

Accuracy = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Options:
    """Write a folder with a network's weights, a description and a model card, to publish and load."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Run directory, of which checkpoints/best.pt is taken, or a checkpoint."""

    output: Annotated[Path, arg(metavar="DIR")]
    """Folder to write."""


def run(options: Options) -> int:
    path = options.run / "checkpoints" / "best.pt" if options.run.is_dir() else options.run
    checkpoint = io.load(path)
    config = checkpoint.network
    network = config.to_dict()
    averaged = checkpoint.ema is not None
    with error_context(str(path)):
        model = create_model(config)
        load_weights(model, checkpoint.eval_weights, config.sizes)
    run_dir = _run_dir(path)
    accuracy = _accuracy(run_dir, checkpoint, network) if run_dir else None
    written = release.write(
        options.output,
        network,
        model,
        gflops=report.cost(model.sizes, [gflops(model, size) for size in model.sizes]),
        accuracy=accuracy,
        averaged=averaged,
        source={
            "run": run_dir.name if run_dir else None,
            "checkpoint": path.name,
            "epoch": checkpoint.epoch,
        },
    )
    weights = "averaged weights" if averaged else "weights"
    print(f"{path}: {weights} after epoch {checkpoint.epoch}")
    if accuracy is None:
        print(
            "note: their accuracies are not known, as there is no evaluation of them in a run directory"
        )
    megabytes = written.config["weights"]["bytes"] / 1e6
    sizes = " ".join(map(str, model.sizes))
    full = sum(v.nbytes for v in written.state.values() if v.is_floating_point()) / 1e6
    unpacked = "" if network["qw"] == FULL else f" ({full:.1f} MB in float32)"
    print(f"{options.output}: {network['arch']}, sizes {sizes}, {megabytes:.1f} MB{unpacked}")
    return 0


def _run_dir(path: Path) -> Path | None:
    folder = path.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def _accuracy(run_dir: Path, checkpoint: Checkpoint, network: Mapping[str, Any]) -> Accuracy | None:
    """What the run's evaluation of just these weights found; None if there was none."""
    metrics = run_dir / "metrics.jsonl"
    if checkpoint.done or not metrics.is_file():
        return None
    for line in reversed(metrics.read_text().splitlines()):
        try:
            logged = json.loads(line)
            if logged["epoch"] == checkpoint.epoch:
                return {
                    name: {what: logged[f"val/{what}@{name}"] for what in ("top1", "top5")}
                    for name in result_names(network)
                }
        except (ValueError, KeyError):  # cut short by a crash, or no evaluation
            continue
    return None

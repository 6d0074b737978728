"""Top-1 of one checkpoint on one validation set, read by each of the three pipelines.

    python -m benchmarks.same_checkpoint --checkpoint best.pt --data /imagenet --beton /imagenet_beton

Prints one JSON object: for each size the three accuracies, and the largest difference of all.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.options import command, require_beton
from pipelines import dali, ffcv, reference
from pipelines.utils.errors import UsageError
from rsnet.config.train_config import TrainConfig


@dataclass(frozen=True)
class Options:
    checkpoint: Path
    """A checkpoint of a run."""

    data: Path
    """Folder with val/."""

    beton: Path
    """Folder with val.beton, made of the same images."""

    batch_size: int = 128
    """Images a batch."""

    workers: int = 2
    """The reference's processes, DALI's and FFCV's threads."""


def run(o: Options) -> int:
    from rsnet.train import run as evaluate  # most of what trains

    if not o.checkpoint.is_file():
        raise UsageError(f"--checkpoint: there is no file {o.checkpoint}")
    require_beton(o.beton, ("val",))
    backends: dict[str, tuple[Any, Any, Path]] = {
        "reference": (reference.ReferenceOptions(o.workers), reference.make_loaders, o.data),
        "dali": (dali.DaliOptions(o.workers), dali.make_loaders, o.data),
        "ffcv": (ffcv.FfcvOptions(o.workers), ffcv.make_loaders, o.beton),
    }
    top1: dict[str, dict[str, float]] = {}
    for name, (options, make_loaders, data) in backends.items():
        config = TrainConfig(
            data=str(data), evaluate=True, resume=str(o.checkpoint), batch_size=o.batch_size
        )
        for size, scores in evaluate(name, config, options, make_loaders).items():
            top1.setdefault(str(size), {})[name] = round(scores["top1"], 2)
    differences = [max(row.values()) - min(row.values()) for row in top1.values()]
    print(json.dumps({"top1": top1, "largest_difference": round(max(differences), 2)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(command("same_checkpoint", Options, run))

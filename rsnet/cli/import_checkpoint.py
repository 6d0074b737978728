"""`rsnet import`: a checkpoint of the authors' training code as a run directory."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pipelines.utils.errors import UsageError
from pipelines.utils.output import say


@dataclass(frozen=True)
class Options:
    """Make a run directory of a checkpoint of the original code."""

    original: Positional[Annotated[Path, arg(metavar="ORIGINAL.pth.tar")]]
    """The original's file."""

    output: Annotated[Path, arg(metavar="DIR")]
    """Run directory to write."""

    arch: Annotated[str | None, arg(metavar="NAME")] = None
    """Network that it holds, if the file does not say."""

    sizes: Annotated[tuple[int, ...] | None, arg(metavar="INT [INT ...]")] = None
    """--sizes as the original was given them, in that order. Unset: 224 192 160 128 96."""


def run(options: Options) -> int:
    from rsnet.checkpoint import io
    from rsnet.checkpoint.authors_optimizer import weight_decay
    from rsnet.config.model_config import DEFAULT_SIZES
    from rsnet.loggers.run_dir import write_imported_run

    checkpoint = io.load(options.original, options.arch, options.sizes)
    if not checkpoint.of_authors:
        raise UsageError(f"{options.original}: this is a checkpoint of this trainer already")
    best = write_imported_run(options.output, options.original, checkpoint)
    network = checkpoint.network
    order = " ".join(map(str, options.sizes or DEFAULT_SIZES))
    say(
        f"{network.arch}, {network.num_classes} classes, sizes "
        f"{' '.join(map(str, network.sizes))} (as its bn_0, bn_1, ... are of {order}), "
        "--normalize unit; evaluate it with"
    )
    say(f"python train_dali.py --data DATA --evaluate --resume {shlex.quote(str(best))}")
    decay = weight_decay(checkpoint)
    if checkpoint.optimizer is None or decay is None:
        say(
            "note: it has no momentum; a training that goes on starts without, with the paper's weight decay"
        )
    else:
        say(f"its momentum and weight decay {decay:g} are taken along, for a training that goes on")
    return 0

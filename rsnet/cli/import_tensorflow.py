"""`rsnet import-tf`: a checkpoint of the authors' quantized training code as a run directory."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pipelines.utils.errors import error_context
from pipelines.utils.output import say


@dataclass(frozen=True)
class Options:
    """Make a run directory of a checkpoint of the original quantized training code."""

    original: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]]
    """model-STEP, a folder of such, whose latest is taken, or tensorpack's .npz."""

    output: Annotated[Path, arg(metavar="DIR")]
    """Run directory to write."""


def run(options: Options) -> int:
    from rsnet.checkpoint import tf_checkpoint
    from rsnet.checkpoint.authors_tensorflow import from_tensorflow, is_of_model
    from rsnet.loggers.run_dir import write_imported_run

    variables = tf_checkpoint.read(options.original, is_of_model)
    with error_context(str(options.original)):
        checkpoint = from_tensorflow(variables)
    best = write_imported_run(options.output, options.original, checkpoint)
    network = checkpoint.network
    say(
        f"{network.arch} --mode {network.mode} --qw {network.qw} --qa {network.qa}, "
        f"{network.num_classes} classes, sizes {' '.join(map(str, network.sizes))}, "
        "--normalize imagenet, its first layer for RGB; evaluate it with"
    )
    say(f"rsnet train --data DATA --evaluate --resume {shlex.quote(str(best))}")
    say(
        "note: the original makes the largest image by cubic interpolation and all others of that one, by "
        "nearest neighbour; here they are resized as in all runs, and accuracy may differ"
    )
    return 0

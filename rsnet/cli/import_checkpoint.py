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
    """Make a run directory of a checkpoint of the original code, or of its quantized training code."""

    original: Positional[Annotated[Path, arg(metavar="ORIGINAL")]]
    """The original's file: model_best.pth.tar, or what `rsnet import-tf` takes."""

    output: Annotated[Path, arg(metavar="DIR")]
    """Run directory to write."""

    arch: Annotated[str | None, arg(metavar="NAME")] = None
    """Network that it holds, if the file does not say."""

    sizes: Annotated[tuple[int, ...] | None, arg(metavar="INT [INT ...]")] = None
    """--sizes as the original was given them, in that order. Unset: 224 192 160 128 96."""


def run(options: Options) -> int:
    from rsnet.checkpoint import tf_checkpoint

    if tf_checkpoint.is_tf_checkpoint(options.original):
        return _import_tensorflow(options)
    from rsnet.checkpoint.authors_optimizer import weight_decay
    from rsnet.config.model_config import DEFAULT_SIZES
    from rsnet.loggers.run_dir import write_imported_run
    from rsnet.release.source import open_source

    source = open_source(options.original, options.arch, options.sizes)
    checkpoint = source.checkpoint
    if source.kind != "original":
        raise UsageError(f"{options.original}: this is a {source.kind} of this trainer already")
    best = write_imported_run(options.output, options.original, checkpoint)
    network = checkpoint.network
    order = " ".join(map(str, options.sizes or DEFAULT_SIZES))
    say(
        f"{network.arch}, {network.num_classes} classes, sizes "
        f"{' '.join(map(str, network.sizes))} (as its bn_0, bn_1, ... are of {order}), "
        "--normalize unit; evaluate it with"
    )
    say(f"rsnet train --data DATA --evaluate --resume {shlex.quote(str(best))}")
    decay = weight_decay(checkpoint)
    if checkpoint.optimizer is None or decay is None:
        say(
            "note: it has no momentum; a training that goes on starts without, with the paper's weight decay"
        )
    else:
        say(f"its momentum and weight decay {decay:g} are taken along, for a training that goes on")
    return 0


def _import_tensorflow(options: Options) -> int:
    from rsnet.cli import import_tensorflow

    if options.arch is not None or options.sizes is not None:
        raise UsageError(
            f"--arch, --sizes: {options.original} is of the quantized training code, and names them"
        )
    return import_tensorflow.run(
        import_tensorflow.Options(original=options.original, output=options.output)
    )

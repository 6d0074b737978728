"""`python -m rsnet import`, `import-tf`, `export`: from and to the original implementation's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from pipelines.utils.errors import UsageError, blame
from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint import tf_checkpoint as tensorflow_file
from rsnet.checkpoint.authors_pytorch import to_original
from rsnet.checkpoint.authors_tensorflow import from_tensorflow, is_of_model
from rsnet.config.train_config import DEFAULT_SIZES
from rsnet.loggers.run_dir import RunDir


@dataclass(frozen=True)
class ImportOptions:
    """Make a run directory of a checkpoint of the original code."""

    original: Positional[Annotated[Path, arg(metavar="ORIGINAL.pth.tar")]]
    """The original's file."""

    output: Annotated[Path, arg(metavar="DIR")]
    """Run directory to write."""

    arch: Annotated[str | None, arg(metavar="NAME")] = None
    """Which network it holds, if the file does not say."""

    sizes: Annotated[tuple[int, ...] | None, arg(metavar="INT [INT ...]")] = None
    """--sizes as the original was given them, in that order. Unset: 224 192 160 128 96."""


@dataclass(frozen=True)
class ImportTensorFlowOptions:
    """Make a run directory of a checkpoint of the original quantized training code."""

    original: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]]
    """model-STEP, a folder of such, whose latest is taken, or tensorpack's .npz."""

    output: Annotated[Path, arg(metavar="DIR")]
    """Run directory to write."""


def import_original(options: ImportOptions) -> int:
    content = checkpoint.load(options.original, options.arch, options.sizes)
    if "format" in content:
        raise UsageError(f"{options.original}: this is a checkpoint of this trainer already")
    best = _write_run(options.output, options.original, content)
    network = content["network"]
    order = " ".join(map(str, options.sizes or DEFAULT_SIZES))
    print(
        f"{network['arch']}, {network['num_classes']} classes, sizes "
        f"{' '.join(map(str, network['sizes']))} (as its bn_0, bn_1, ... are of {order}), "
        "--normalize unit; evaluate it with\n"
        f"python train_dali.py --data DATA --evaluate --resume {best}"
    )
    return 0


def import_tensorflow(options: ImportTensorFlowOptions) -> int:
    variables = tensorflow_file.read(options.original, is_of_model)
    with blame(str(options.original)):
        content = checkpoint.NEW_RUN | from_tensorflow(variables)
    best = _write_run(options.output, options.original, content)
    network = content["network"]
    print(
        f"{network['arch']} --mode {network['mode']} --qw {network['qw']} --qa {network['qa']}, "
        f"{network['num_classes']} classes, sizes {' '.join(map(str, network['sizes']))}, "
        "--normalize imagenet, its first layer for RGB; evaluate it with\n"
        f"python train_dali.py --data DATA --evaluate --resume {best}\n"
        "note: the original makes the largest picture by cubic interpolation and all others of that one, by "
        "nearest neighbour; here they are resized as in all runs, and accuracy may differ"
    )
    return 0


def export_original(path: Path, output: Path) -> int:
    """Write the checkpoint at `path` to the file `output`, for the original code. Returns the exit code."""
    content = checkpoint.load(path)
    exported = to_original(content)
    checkpoint.write(output, exported)
    network = content["network"]
    sizes = " ".join(map(str, network["sizes"]))
    print(f"{output}: for the original code with --arch {network['arch']} --sizes {sizes}")
    if network["normalize"] != "unit":
        print(
            f"note: it was trained with --normalize {network['normalize']}; the original code feeds [0, 1]"
        )
    return 0


def _write_run(output: Path, original: Path, content: Mapping[str, Any]) -> Path:
    """Make a run directory that holds `content` as its checkpoints; returns the path of the best."""
    run_dir = RunDir(output, continues=False, active=True)
    for path in (run_dir.last, run_dir.best):
        checkpoint.save(path, content)
    run_dir.write_json("config.json", {"imported": str(original), **content["network"]})
    return run_dir.best

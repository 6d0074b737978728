"""`python -m rsnet import` and `export`: to and from the original implementation's checkpoint files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pipelines.errors import UsageError
from rsnet import checkpoint
from rsnet.config import DEFAULT_SIZES
from rsnet.original import to_original
from rsnet.runlog import RunDir


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
class ExportOptions:
    """Write a checkpoint for the original code."""

    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT.pt")]]
    """A checkpoint of a run."""

    output: Annotated[Path, arg(metavar="FILE.pth.tar")]
    """File to write."""


def import_original(options: ImportOptions) -> int:
    content = checkpoint.load(options.original, options.arch, options.sizes)
    if "format" in content:
        raise UsageError(f"{options.original}: this is a checkpoint of this trainer already")
    run_dir = RunDir(options.output, continues=False, active=True)
    for path in (run_dir.last, run_dir.best):
        checkpoint.save(path, content)
    run_dir.write_json("config.json", {"imported": str(options.original), **content["network"]})
    network = content["network"]
    order = " ".join(map(str, options.sizes or DEFAULT_SIZES))
    print(
        f"{network['arch']}, {network['num_classes']} classes, sizes "
        f"{' '.join(map(str, network['sizes']))} (as its bn_0, bn_1, ... are of {order}), "
        "--normalize unit; evaluate it with\n"
        f"python train_dali.py --data DATA --evaluate --resume {run_dir.best}"
    )
    return 0


def export_original(options: ExportOptions) -> int:
    if options.output.exists():
        raise UsageError(f"--output: {options.output} exists; give another name")
    content = checkpoint.load(options.checkpoint)
    exported = to_original(content)
    checkpoint.write(options.output, exported)
    network = content["network"]
    sizes = " ".join(map(str, network["sizes"]))
    print(f"{options.output}: for the original code with --arch {network['arch']} --sizes {sizes}")
    if network["normalize"] != "unit":
        print(
            f"note: it was trained with --normalize {network['normalize']}; the original code feeds [0, 1]"
        )
    return 0

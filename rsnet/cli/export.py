"""`rsnet export`: a network for other programs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from pipelines.utils.errors import UsageError
from pipelines.utils.output import say
from pipelines.utils.tables import text_table
from rsnet.cli.classifier import SOURCE, say_source
from rsnet.cli.output import require_new

if TYPE_CHECKING:
    from rsnet.release.source import SavedNetwork


@dataclass(frozen=True)
class Options:
    """Write a network for other programs: for the original code, ONNX, torch.export, torchvision or timm.

    All but the first take normalised images, float32 (N, 3, size, size), any N, to logits. Each file is run
    and compared with the network, and export.json beside them says how far it is off.
    """

    source: Positional[Annotated[str, arg(metavar=SOURCE)]]
    """Run directory, checkpoint, release, or file of the original code."""

    output: Annotated[Path, arg(metavar="OUT")]
    """File to write for the original code, else folder."""

    format: Literal["original", "onnx", "torch.export", "torchvision", "timm"] = "original"
    """original: a file for the original code. onnx, torch.export: a file for each size. torchvision, timm:
    each size's weights as a state dict of the library's own network."""

    sizes: Annotated[tuple[int, ...] | None, arg(metavar="INT [INT ...]")] = None
    """Sizes to write, but for the original code. Unset: all."""

    one_file: bool = False
    """For onnx: one file for all sizes, the weights in it once, with a second input `size`."""

    int8: bool = False
    """For onnx: weights and activations in 8-bit integers, with scales for each size; needs --calibrate."""

    calibrate: Annotated[Path | None, arg(metavar="VAL")] = None
    """For --int8: folder with one folder of images per class, or one whose val/ is that. The activations'
    ranges are seen on some of the images; the accuracy and latency of all precisions on all of them."""

    max_drop: float | None = None
    """For --int8: percentage points that top-1 may fall by at any size; a file that loses more is refused.
    Unset: 1."""

    def __post_init__(self) -> None:
        if self.format == "original" and (self.sizes is not None or self.one_file):
            raise UsageError("--sizes and --one-file: --format original takes all sizes")
        if self.format == "original" and "onnx" in (self.output.name, self.output.suffix[1:]):
            raise UsageError(
                f"--output {self.output}: give --format onnx, too; without it the file is for the "
                "original code"
            )
        if self.int8 and (self.format != "onnx" or self.one_file):
            raise UsageError("--int8 is of --format onnx, a file for each size")
        if self.int8 and self.calibrate is None:
            raise UsageError("--int8: give --calibrate, too, the folder of labelled images")
        if not self.int8 and (self.calibrate, self.max_drop) != (None, None):
            raise UsageError("--calibrate and --max-drop are of --int8")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise UsageError(f"--max-drop {self.max_drop}: must be from 0 to 100 percentage points")


def run(options: Options) -> int:
    require_new("--output", options.output)
    from rsnet.release.source import open_source

    source = open_source(options.source)
    say_source(source)
    if options.format == "original":
        return _export_original(options, source)
    if options.int8:
        return _export_int8(options, source)
    from rsnet.export.writer import export_release
    from rsnet.release.from_run import released

    files = export_release(
        released(source),
        options.output,
        options.format,
        sizes=options.sizes,
        one_file=options.one_file,
    )
    for file in files:
        off = max(value for errors in file["max_abs_error"].values() for value in errors.values())
        how = f"off by at most {off:.1e}" if off else "the same, bit for bit"
        say(
            f"{options.output / file['file']}: size {' '.join(map(str, file['sizes']))}, "
            f"{file['bytes'] / 1e6:.1f} MB, logits {how}"
        )
    return 0


def _export_int8(options: Options, source: SavedNetwork) -> int:
    from rsnet.export.int8 import PRECISIONS, export_int8
    from rsnet.release.from_run import released

    assert options.calibrate is not None
    report = export_int8(
        released(source),
        options.output,
        options.calibrate,
        sizes=options.sizes,
        max_drop=1.0 if options.max_drop is None else options.max_drop,
        say=lambda line: say(line, sys.stderr),
    )
    conditions = report["comparison_conditions"]
    threads = conditions["threads"]
    say(
        f"{report['comparison_images']} images; {conditions['device']}, {threads} "
        f"thread{'s' * (threads > 1)}, batches of 1"
    )
    rows = [
        [
            size,
            *(
                f"{found[name][key]:.2f}" if found[name] else ""
                for key in ("top1", "ms")
                for name in PRECISIONS
            ),
        ]
        for size, found in report["comparison"].items()
    ]
    print(
        text_table(
            ["size", *(f"{what}, {name}" for what in ("top-1 %", "ms") for name in PRECISIONS)],
            rows,
        )
    )
    for file in report["files"]:
        megabytes, before = (file[key] / 1e6 for key in ("bytes", "float32_bytes"))
        say(f"{options.output / file['file']}: {megabytes:.1f} MB, in float32 {before:.1f} MB")
    return 0


def _export_original(options: Options, source: SavedNetwork) -> int:
    from rsnet.export.original import export_original

    network = source.network
    optimizer = export_original(source.checkpoint, options.output)
    sizes = " ".join(map(str, network.sizes))
    say(f"{options.output}: for the original code with --arch {network.arch} --sizes {sizes}")
    decay = optimizer["param_groups"][0]["weight_decay"]
    momentum = "its momentum" if optimizer["state"] else "no momentum, which the checkpoint lacks"
    say(f"a training that goes on there has weight decay {decay:g} and {momentum}")
    if network.normalize != "unit":
        say(
            f"note: it was trained with --normalize {network.normalize}; the original code feeds [0, 1]"
        )
    return 0

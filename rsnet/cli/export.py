"""`rsnet export`: a network for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from pipelines.utils.errors import UsageError
from pipelines.utils.output import say
from rsnet.cli.classifier import SOURCE, say_source


@dataclass(frozen=True)
class Options:
    """Write a network for other programs: for the original code, ONNX or torch.export.

    The latter two take normalised images, float32 (N, 3, size, size), any N, to logits. Each file is run and
    compared with the network, and export.json beside them says how far it is off.
    """

    source: Positional[Annotated[str, arg(metavar=SOURCE)]]
    """Run directory, checkpoint, release, or file of the original code."""

    output: Annotated[Path, arg(metavar="OUT")]
    """File to write for the original code, else folder."""

    format: Literal["original", "onnx", "torch.export"] = "original"
    """original: a file for the original code. onnx, torch.export: a file for each size."""

    sizes: Annotated[tuple[int, ...] | None, arg(metavar="INT [INT ...]")] = None
    """Sizes for onnx and torch.export. Unset: all."""

    one_file: bool = False
    """For onnx: one file for all sizes, the weights in it once, with a second input `size`."""


def run(options: Options) -> int:
    if options.output.exists() or options.output.is_symlink():
        raise UsageError(f"--output: {options.output} exists; give another name")
    if options.format == "original":
        return _export_original(options)
    from rsnet.export.writer import export_release
    from rsnet.release.from_run import released
    from rsnet.release.source import open_source

    source = open_source(options.source)
    say_source(source)
    files = export_release(
        released(source),
        options.output,
        options.format,
        sizes=options.sizes,
        one_file=options.one_file,
    )
    for file in files:
        off = max(value for errors in file["max_abs_error"].values() for value in errors.values())
        say(
            f"{options.output / file['file']}: size {' '.join(map(str, file['sizes']))}, "
            f"{file['bytes'] / 1e6:.1f} MB, logits off by at most {off:.1e}"
        )
    return 0


def _export_original(options: Options) -> int:
    if options.sizes is not None or options.one_file:
        raise UsageError("--sizes and --one-file are of --format onnx and torch.export")
    from rsnet.export.original import export_original
    from rsnet.release.source import open_source

    source = open_source(options.source)
    say_source(source)
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

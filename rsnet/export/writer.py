"""`python -m rsnet export`: a network for other programs, checked against itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
from tyro.conf import Positional, arg

from pipelines.utils.atomic_io import new_folder, write_json
from pipelines.utils.errors import DataError, UsageError, first_line
from rsnet.cli import import_checkpoint as convert
from rsnet.export import onnx_export as onnx_file
from rsnet.export import program_file
from rsnet.export.torch_export import has_levels, traceable
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.release import package as release

REPORT = "export.json"

# Of the largest logit: how far one may be off. Rounding makes up to 1e-5 of it, as BatchNorm is folded and
# other kernels add up in another order; what a wrong layer makes is of the size of the logits.
BOUND = 1e-3
# Where activations are quantized, rounding moves some of them by a level, and those after them (ONNX Runtime,
# ResNet-18 with activations of 2, 4 and 8 bits, untrained, 224 pixels: up to 7e-2).
BOUND_OF_LEVELS = 0.25
BATCHES = (1, 3)


@dataclass(frozen=True)
class Options:
    """Write a network for other programs: for the original code, ONNX or torch.export.

    The latter two take normalised images, float32 (N, 3, size, size), any N, to logits. Each file is run and
    compared with the network, and export.json beside them says how far it is off.
    """

    source: Positional[Annotated[Path, arg(metavar="CHECKPOINT.pt|DIR")]]
    """For the original code a checkpoint of a run, else a folder that `python -m rsnet release` wrote."""

    output: Annotated[Path, arg(metavar="OUT")]
    """File to write for the original code, else folder."""

    format: Literal["original", "onnx", "torch.export"] = "original"
    """original: a file for the original code. onnx, torch.export: a file for each size."""

    sizes: Annotated[tuple[int, ...] | None, arg(metavar="INT [INT ...]")] = None
    """Of onnx and torch.export: which ones. Unset: all."""

    one_file: bool = False
    """Of onnx: one file for all sizes, the weights in it once, with a second input `size`."""


def run(options: Options) -> int:
    if options.output.exists() or options.output.is_symlink():
        raise UsageError(f"--output: {options.output} exists; give another name")
    if options.format == "original":
        return _for_the_original(options)
    _require_release(options)
    content = release.read(options.source)
    sizes = _sizes(options, content.config["network"]["sizes"])
    model = release.built(content, sizes)
    about = _about(content.config)
    with new_folder(options.output) as folder:
        files = [_write(options, folder, model, part, about) for part in _parts(options, sizes)]
        report = {"format": options.format, **about, "bound": _bound(model), "files": files}
        write_json(folder / REPORT, report)
    for file in files:
        off = max(value for errors in file["max_abs_error"].values() for value in errors.values())
        print(
            f"{options.output / file['file']}: size {' '.join(map(str, file['sizes']))}, "
            f"{file['bytes'] / 1e6:.1f} MB, logits off by at most {off:.1e}"
        )
    return 0


def _for_the_original(options: Options) -> int:
    if options.source.is_dir():
        raise UsageError(
            f"{options.source} is a folder; --format original takes RUN/checkpoints/best.pt"
        )
    if options.sizes is not None or options.one_file:
        raise UsageError("--sizes and --one-file are of --format onnx and torch.export")
    return convert.export_original(options.source, options.output)


def _require_release(options: Options) -> None:
    if options.source.is_file() or (options.source / "checkpoints").is_dir():
        raise UsageError(
            f"--format {options.format} takes a release; write one by "
            f"`python -m rsnet release {options.source} --output DIR`"
        )
    if options.format == "onnx":
        onnx_file.require()
    elif options.one_file:
        raise UsageError("--one-file is of --format onnx")


def _sizes(options: Options, known: Sequence[int]) -> list[int]:
    """Which sizes are exported, the largest first."""
    wanted = known if options.sizes is None else options.sizes
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(known):
        there, here = (" ".join(map(str, s)) for s in (known, wanted))
        raise UsageError(f"--sizes {here}: give some of {there}, each once")
    if options.one_file and len(wanted) == 1:
        raise UsageError("--one-file is for two sizes or more")
    return sorted(wanted, reverse=True)


def _parts(options: Options, sizes: list[int]) -> list[list[int]]:
    """The sizes of each file."""
    return [sizes] if options.one_file else [[size] for size in sizes]


def _write(
    options: Options,
    folder: Path,
    model: ResolutionSwitchable,
    sizes: list[int],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write one file, compare it with the network, and return what the report says of it.

    Raises DataError if PyTorch cannot export the network, or the file computes something else.
    """
    writer = onnx_file if options.format == "onnx" else program_file
    named = "" if options.one_file else f"-{sizes[0]}"
    path = folder / f"model{named}{writer.SUFFIX}"
    # One file for all has the weights that all share.
    fold = not options.one_file and not has_levels(model)
    try:
        networks = {size: traceable(model, size, fold) for size in sizes}
        if options.one_file:
            onnx_file.write_all(path, networks, {"sizes": sizes, **about})
        else:
            writer.write(path, networks[sizes[0]], sizes[0], {"size": sizes[0], **about})
        errors = {str(size): _errors(model, writer, path, size) for size in sizes}
    except (DataError, OSError):
        raise
    except Exception as error:  # whatever a library's exporter or runtime says to a layer
        reason = first_line(_first_cause(error))
        raise DataError(
            f"--format {options.format}: {about['arch']} cannot be exported ({reason})"
        ) from error
    data = path.read_bytes()
    return {
        "file": path.name,
        "sizes": sizes,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "batchnorm_folded": fold,
        "max_abs_error": errors,
    }


@torch.no_grad()
def _errors(
    model: ResolutionSwitchable, writer: ModuleType, path: Path, size: int
) -> dict[str, float]:
    """{images in a batch: the largest difference of a logit from the network's}.

    Raises DataError if that is more than the bound.
    """
    found, bound = {}, _bound(model)
    for count in BATCHES:
        images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))
        expected = model(images, size)
        off = (writer.logits(path, images, size) - expected).abs().max().item()
        largest = expected.abs().max().item()
        if not off <= bound * largest:
            raise DataError(
                f"{path.name} computes something else: at size {size} a logit is off by {off:.1e}, "
                f"more than {bound} of {largest:.1e}, the largest; nothing was written"
            )
        found[str(count)] = off
    return found


def _bound(model: ResolutionSwitchable) -> float:
    return BOUND_OF_LEVELS if has_levels(model) else BOUND


def _first_cause(error: BaseException) -> BaseException:
    """What the exporter met; what it says of that is a page on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _about(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a program has to know that runs a file."""
    network = config["network"]
    return {
        "arch": network["arch"],
        "input": "images: float32 (N, 3, size, size), RGB, (value / 255 - mean) / std",
        "output": "logits: float32 (N, classes)",
        "preprocessing": config["preprocessing"],
        "classes": network["classes"],
        "weights_sha256": config["weights"]["sha256"],
    }

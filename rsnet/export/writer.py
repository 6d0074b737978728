"""Export a released network for other programs; each file is compared with the network before it appears."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from pipelines.utils.atomic_io import atomic_directory, atomic_write_json
from pipelines.utils.errors import DataError, UsageError, first_line
from rsnet.export import library_weights, onnx_export, torch_export
from rsnet.export.torch_export import traceable
from rsnet.inference.onnx_runner import REPORT
from rsnet.models.fold import is_foldable, plain
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.release import package as release

Format = Literal["onnx", "torch.export", "torchvision", "timm"]

# Largest error of a logit, as a part of the largest logit. Rounding makes up to 1e-5, as BatchNorm is folded
# and other kernels sum in another order; a wrong layer makes errors as large as the logits.
BOUND = 1e-3
# Where activations are quantized, rounding moves some of them by a level, and those after them (ONNX Runtime,
# ResNet-18 with activations of 2, 4 and 8 bits, untrained, 224 pixels: up to 7e-2).
BOUND_OF_LEVELS = 0.25
BATCHES = (1, 3)

CONTIGUOUS = (torch.contiguous_format,)
BOTH_LAYOUTS = (torch.contiguous_format, torch.channels_last)


def export_release(
    source: str | Path | release.Release,
    output: str | Path,
    file_format: Format,
    *,
    sizes: Sequence[int] | None = None,
    one_file: bool = False,
) -> list[dict[str, Any]]:
    """Write a release as files of `file_format` in a new folder, compared with the network.

    source: a release that was read, or its folder.

    sizes: which ones; None for all. one_file: ONNX alone, all sizes in one file, the weights once.

    Returns the entries of export.json, one a file. Raises UsageError for what cannot be asked for, DataError
    if a network cannot be exported or a file computes something else; then there is no folder.
    """
    output = Path(output)
    if file_format == "onnx":
        onnx_export.require()
    elif one_file:
        raise UsageError("--one-file is of --format onnx")
    content = source if isinstance(source, release.Release) else release.read(source)
    chosen = _chosen_sizes(sizes, content.config["network"]["sizes"], one_file)
    about = _about(content.config)
    if file_format in ("torchvision", "timm"):
        about |= library_weights.describe(file_format, content.config)
    model = release.build(content, chosen)
    with atomic_directory(output) as folder:
        if file_format in ("torchvision", "timm"):
            files = [
                file
                for size in chosen
                for file in _write_weights(folder, model, size, content.config, about)
            ]
        else:
            writer = onnx_export if file_format == "onnx" else torch_export
            files = [
                _write(writer, folder, model, part, about)
                for part in ([chosen] if one_file else [[size] for size in chosen])
            ]
        report = {"format": file_format, **about, "bound": _bound(model), "files": files}
        if file_format == "onnx":  # what computes with these files needs it
            report["dtype"] = "float32"
            atomic_write_json(folder / release.CONFIG, content.config)
        atomic_write_json(folder / REPORT, report)
    return files


def _chosen_sizes(sizes: Sequence[int] | None, known: Sequence[int], one_file: bool) -> list[int]:
    """Return the sizes to export, the largest first."""
    wanted = known if sizes is None else sizes
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(known):
        there, here = (" ".join(map(str, s)) for s in (known, wanted))
        raise UsageError(f"--sizes {here}: give some of {there}, each once")
    if one_file and len(wanted) == 1:
        raise UsageError("--one-file is for two sizes or more")
    return sorted(wanted, reverse=True)


def _write(
    writer: ModuleType,
    folder: Path,
    model: ResolutionSwitchable,
    sizes: list[int],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write one file, compare it with the network, and return its entry in the report.

    Raises DataError if PyTorch cannot export the network, or the file computes something else.
    """
    one_file = len(sizes) > 1
    named = "" if one_file else f"-{sizes[0]}"
    path = folder / f"model{named}{writer.SUFFIX}"
    # In one file for all sizes, they share the weights.
    fold = not one_file and is_foldable(model)
    try:
        networks = {size: traceable(model, size, fold) for size in sizes}
        if one_file:
            onnx_export.write_all(path, networks, {"sizes": sizes, **about})
        else:
            writer.write(path, networks[sizes[0]], sizes[0], {"size": sizes[0], **about})
        exported = writer.load(path)
        errors = {str(size): _errors(model, exported, path, size) for size in sizes}
    except (DataError, OSError):
        raise
    except Exception as error:  # exporters and runtimes raise all kinds
        reason = first_line(_first_cause(error))
        raise DataError(
            f"--format {writer.FORMAT}: {about['arch']} cannot be exported ({reason})"
        ) from error
    return _entry(path, sizes, fold, errors)


def _write_weights(
    folder: Path,
    model: ResolutionSwitchable,
    size: int,
    config: Mapping[str, Any],
    about: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Write one size as a library's network, whose logits are compared, and return the files' entries.

    Raises DataError if the library's network has other layers.
    """
    paths = [folder / f"model-{size}{suffix}" for suffix in library_weights.SUFFIXES]
    whole = {**about, **library_weights.preparation(config, size)}
    library_weights.write(paths[0], plain(model, size), whole)
    try:
        exported = library_weights.load(paths[-1], about)
    except RuntimeError as error:
        raise DataError(
            f"{about['library']}'s {about['architecture']} has other layers than {about['arch']}; "
            "nothing was written"
        ) from error
    errors = {str(size): _errors(model, exported, paths[-1], size, BOTH_LAYOUTS)}
    return [_entry(path, [size], False, errors) for path in paths]


def _entry(
    path: Path, sizes: list[int], fold: bool, errors: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
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
    model: ResolutionSwitchable,
    exported: Callable[[Tensor, int], Tensor],
    path: Path,
    size: int,
    layouts: Sequence[torch.memory_format] = CONTIGUOUS,
) -> dict[str, float]:
    """Return {images in a batch: the largest difference of a logit from the network's}.

    Raises DataError if that is more than the bound.
    """
    found: dict[str, float] = {}
    bound = _bound(model)
    for layout, count in itertools.product(layouts, BATCHES):
        images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))
        images = images.contiguous(memory_format=layout)
        expected = model.to(memory_format=layout)(images, size)
        off = (exported(images, size) - expected).abs().max().item()
        largest = expected.abs().max().item()
        if not off <= bound * largest:
            raise DataError(
                f"{path.name} computes something else: at size {size} a logit is off by {off:.1e}, "
                f"more than {bound} of {largest:.1e}, the largest; nothing was written"
            )
        found[str(count)] = max(off, found.get(str(count), 0.0))
    return found


def _bound(model: ResolutionSwitchable) -> float:
    return BOUND if is_foldable(model) else BOUND_OF_LEVELS


def _first_cause(error: BaseException) -> BaseException:
    """Return what the exporter met; its own message is a page on how to report that."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _about(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a program that runs a file has to know."""
    network = config["network"]
    return {
        "arch": network["arch"],
        "input": "images: float32 (N, 3, size, size), RGB, (value / 255 - mean) / std",
        "output": "logits: float32 (N, classes)",
        "preprocessing": config["preprocessing"],
        "classes": network["classes"],
        "weights_sha256": config["weights"]["sha256"],
    }

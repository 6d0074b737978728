"""ONNX in 8-bit integers: ONNX Runtime's static quantization, each size with scales of its own."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.sources.folder import ImageFolder
from pipelines.utils.atomic_io import atomic_directory, atomic_write_json
from pipelines.utils.errors import DataError, UsageError, first_line
from rsnet.config.model_config import ModelConfig
from rsnet.distributed.device import has_bf16
from rsnet.export import onnx_export
from rsnet.export.writer import export_release
from rsnet.inference import latency
from rsnet.inference.calibration import collect_logits, find_labelled_images
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.inference.onnx_runner import REPORT
from rsnet.inference.preprocess import eval_pixels
from rsnet.release import package as release

# Images that the ranges of activations are seen on, spread evenly over those given: a few hundred is what
# ONNX Runtime's own examples take, and the extremes of more are those of outliers.
CALIBRATED = 256

REPEATS = 50

PRECISIONS = ("float32", "bfloat16", "int8")

# Quantities of a size in export.json, by precision.
Comparison = dict[str, dict[str, dict[str, float] | None]]


def export_int8(
    source: str | Path | release.Release,
    output: str | Path,
    data: str | Path,
    *,
    sizes: Sequence[int] | None = None,
    max_drop: float = 1.0,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write a release as an ONNX file of 8-bit integers for each size, in a new folder.

    source: a release that was read, or its folder.

    data: labelled images, which activations are calibrated with, and float32, bfloat16 and int8 compared on.
    max_drop: percentage points that top-1 may be below float32's. say: is told what is done, as it takes
    minutes.

    Returns the content of export.json. Raises UsageError for a network that is quantized already, and images
    that are not of its classes; DataError if top-1 falls by more at any size; then there is no folder.
    """
    onnx_export.require()
    content = source if isinstance(source, release.Release) else release.read(source)
    config = content.config
    network = ModelConfig.from_dict(config["network"])
    if network.is_quantized:
        raise UsageError(
            f"--int8: this network is quantized already (--qw {network.qw} --qa {network.qa}): 8 bits would "
            "round its levels again, and ONNX Runtime has no faster kernels for fewer bits"
        )
    images = _labelled_images(data, config["network"])
    output = Path(output)
    with tempfile.TemporaryDirectory() as temporary, atomic_directory(output) as folder:
        full = Path(temporary) / "float32"
        say("exporting float32")
        export_release(content, full, "onnx", sizes=sizes)
        report: dict[str, Any] = json.loads((full / REPORT).read_bytes())
        classifier = SwitchableClassifier.load(full, batch_size=1, engine="onnxruntime")
        chosen = _spread(images.paths, CALIBRATED)
        files = []
        for file in report["files"]:
            (size,) = file["sizes"]
            say(f"calibrating size {size} on {len(chosen)} images")
            target = folder / file["file"]
            try:
                quantize(full / file["file"], target, _inputs(classifier, chosen, size))
            except (DataError, OSError):
                raise
            except Exception as error:  # ONNX Runtime raises all kinds
                raise DataError(
                    f"--int8: {network.arch} cannot be quantized ({first_line(error)})"
                ) from error
            files.append(_entry(target, file))
        del report["bound"]  # of logits, which are another's
        report |= {"dtype": "int8", "files": files, "calibration_images": len(chosen)}
        atomic_write_json(folder / REPORT, report)
        atomic_write_json(folder / release.CONFIG, config)
        say(f"comparing on {len(images.paths)} images")
        report |= _compare(content, full, folder, images)
        _require_accuracy(report["comparison"], max_drop)
        atomic_write_json(folder / REPORT, report)
    return report


def _labelled_images(data: str | Path, network: Mapping[str, Any]) -> ImageFolder:
    try:
        return find_labelled_images(data, network)
    except UsageError as error:
        raise UsageError(str(error).replace("--data", "--calibrate", 1)) from error


def quantize(source: Path, target: Path, inputs: Iterable[NDArray[np.float32]]) -> None:
    """Write the ONNX file `source` with 8-bit weights, a scale for each channel, and 8-bit activations.

    inputs: (1, 3, s, s) each, whose activations give the ranges.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._inputs = iter(inputs)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            found = next(self._inputs, None)
            return None if found is None else {"images": found}

    about = {p.key: json.loads(p.value) for p in onnx.load(source).metadata_props}
    with tempfile.TemporaryDirectory() as temporary, _quiet():
        prepared, quantized = (str(Path(temporary) / name) for name in ("prepared", "quantized"))
        quant_pre_process(str(source), prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantized,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # Unsigned by signed is what CPUs of x86 multiply fast (signed by signed is 5 times slower without
            # VNNI). Those without VNNI add two products in 16 bits, which weights of 8 bits would overflow.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
        model = onnx.load(quantized)
        _leave_output_in_float(model.graph)
        onnx_export.save(target, model, about | {"dtype": "int8"})


# Operations that may follow the classifier, by which the quantizer passes its ranges on.
_SHAPES = ("Flatten", "Gather", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def _leave_output_in_float(graph: Any) -> None:
    """Take the pairs of quantization and dequantization behind the classifier out of an ONNX graph.

    They would cut logits off at the range of the images of the calibration, and round many to the same.
    """
    (name,) = [output.name for output in graph.output]
    while True:
        producers = {output: node for node in graph.node for output in node.output}
        node = producers[name]
        if node.op_type == "DequantizeLinear":
            quantize = producers[node.input[0]]
            producers[quantize.input[0]].output[0] = name
            for one in (quantize, node):
                graph.node.remove(one)
        elif node.op_type in _SHAPES and node.input[0] in producers:
            name = node.input[0]
        else:
            break
    used = {value for node in graph.node for value in node.input}
    for value in [value for value in graph.initializer if value.name not in used]:
        graph.initializer.remove(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the quantizer's advice on stderr."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _spread(paths: Sequence[str], count: int) -> list[str]:
    """Return `count` of the paths, evenly spread, or all if there are fewer."""
    number = min(count, len(paths))
    return [paths[i * len(paths) // number] for i in range(number)]


def _inputs(
    classifier: SwitchableClassifier, paths: Sequence[str], size: int
) -> Iterator[NDArray[np.float32]]:
    """Yield images as `rsnet predict` feeds them."""
    for path in paths:
        pixels = eval_pixels(classifier.decode(path), size)
        yield classifier.normalized(pixels[None]).contiguous().numpy()


def _entry(path: Path, full: Mapping[str, Any]) -> dict[str, Any]:
    data = path.read_bytes()
    return {
        "file": path.name,
        "sizes": full["sizes"],
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "float32_bytes": full["bytes"],
    }


def _compare(
    content: release.Release, full: Path, folder: Path, images: ImageFolder
) -> dict[str, Any]:
    """Return accuracies and latencies of each precision, and what they hold for.

    The latencies are of one image, from pixels to probabilities. All take turns, so that what else the
    machine does meanwhile falls on each of them.
    """
    classifiers = {
        "float32": SwitchableClassifier.load(full, engine="onnxruntime"),
        "int8": SwitchableClassifier.load(folder, engine="onnxruntime"),
    }
    sizes = classifiers["int8"].sizes
    if has_bf16(torch.device("cpu")):
        classifiers["bfloat16"] = SwitchableClassifier.load(
            content, dtype=torch.bfloat16, fold=True
        )
        classifiers["bfloat16"].sizes = sizes
    top1 = {}
    for name, classifier in classifiers.items():
        scores = collect_logits(classifier, images)
        for size, logits in scores.logits.items():
            right = logits.argmax(dim=1) == scores.labels
            top1[name, size] = 100 * right.double().mean().item()
    forwards = {name: c.blank_forward(1) for name, c in classifiers.items()}
    times = latency.sample(
        lambda key: forwards[key[0]](key[1]),
        tuple(itertools.product(classifiers, sizes)),
        REPEATS,
    )
    comparison: Comparison = {
        str(size): {
            name: {
                "top1": top1[name, size],
                "ms": round(latency.percentile(times[name, size], 50), 3),
            }
            if name in classifiers
            else None
            for name in PRECISIONS
        }
        for size in sizes
    }
    return {
        "comparison": comparison,
        "comparison_images": len(images.paths),
        "comparison_conditions": {
            "device": latency.device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "batch_size": 1,
            "float32, int8": classifiers["int8"].conditions["engine"],
            "bfloat16": f"torch {torch.__version__}",
        },
    }


def _require_accuracy(comparison: Comparison, max_drop: float) -> None:
    for size, found in comparison.items():
        before, after = (found[name] or {} for name in ("float32", "int8"))
        if before["top1"] - after["top1"] > max_drop:
            raise DataError(
                f"--int8: at size {size} top-1 falls from {before['top1']:.2f} to {after['top1']:.2f} %, by "
                f"more than --max-drop {max_drop:g}; nothing was written"
            )

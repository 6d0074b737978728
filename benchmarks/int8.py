"""Latency of a size in ONNX Runtime, float32 and 8-bit integers, one image at a time on one core.

    python -m benchmarks.int8

The files are those that `rsnet export --format onnx` writes, with and without --int8, of untrained networks:
the time does not depend on the weights. The two alternate in one run, forward by forward, in CPU time, so
that other programs on the machine count little; the ratio of their medians is the figure to trust. Prints one
JSON object per network and size.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.options import command
from rsnet.config.model_config import ModelConfig
from rsnet.export import onnx_export
from rsnet.export.int8 import quantize
from rsnet.export.torch_export import traceable
from rsnet.models.factory import create_model


@dataclass(frozen=True)
class Options:
    arch: tuple[str, ...] = ("parallel_resnet50", "parallel_mobilenetv2")
    """Networks."""

    sizes: tuple[int, ...] = (224,)
    """Input sizes."""

    rounds: int = 60
    """Forwards of each; a tenth before them is not counted."""

    calibrated: int = 8
    """Images of noise that the ranges of activations are seen on."""


def measure(arch: str, size: int, o: Options, folder: Path) -> dict[str, Any]:
    """Return milliseconds of a forward of each precision, and how often the shorter goes into the longer."""
    torch.manual_seed(0)
    model = create_model(ModelConfig(arch, 1000, (size,))).eval()
    files = {name: folder / f"{arch}-{size}-{name}.onnx" for name in ("float32", "int8")}
    onnx_export.write(files["float32"], traceable(model, size, fold=True), size, {})
    rng = np.random.default_rng(0)
    shape = (1, 3, size, size)
    images = (rng.normal(size=shape).astype(np.float32) for _ in range(o.calibrated))
    quantize(files["float32"], files["int8"], images)
    sessions = {name: _session(path) for name, path in files.items()}
    image = {"images": rng.normal(size=shape).astype(np.float32)}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    logits = {}
    for turn in range(o.rounds + o.rounds // 10):
        for name, session in sessions.items():
            start = time.process_time()
            (logits[name],) = session.run(None, image)
            if turn >= o.rounds // 10:
                times[name].append(time.process_time() - start)
    ms = {name: 1000 * statistics.median(some) for name, some in times.items()}
    largest = np.abs(logits["float32"]).max()
    return {
        "arch": arch,
        "size": size,
        "ms": {name: round(value, 2) for name, value in ms.items()},
        "times_as_fast": round(ms["float32"] / ms["int8"], 2),
        "megabytes": {name: round(path.stat().st_size / 1e6, 1) for name, path in files.items()},
        "difference": float(f"{np.abs(logits['float32'] - logits['int8']).max() / largest:.1e}"),
    }


def machine() -> dict[str, Any]:
    """Return the CPU's name, and which instructions for products of small numbers it says that it has."""
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*: *(.+)", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: *(.+)", text, re.MULTILINE)
    known = flags[1].split() if flags else []
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
    return {"cpu": name and name[1], "flags": [flag for flag in wanted if flag in known]}


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(o: Options) -> int:
    """Print the figures of all networks at all sizes."""
    import onnxruntime

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(json.dumps({**machine(), "onnxruntime": onnxruntime.__version__}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for arch in o.arch:
            for size in o.sizes:
                print(json.dumps(measure(arch, size, o, Path(folder))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command("int8", Options, run))

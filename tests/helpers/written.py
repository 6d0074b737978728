"""What version 0.1.0 wrote into tests/data, and how its numbers were taken, there and by later tests."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import itertools
import json
import platform
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numba
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "data" / "written_by_0.1"

# 18 images, 6 updates an epoch, of a network with all that has a state of its own: averaged weights, mixed
# images, sizes drawn at each step. Paths are relative, so that files hold none of a machine.
RUN = (
    "train_dali.py", "--data", "images", "--output", "run", "--arch", "parallel_resnet10",
    "--width-mult", "0.03125", "--stem", "small", "--sizes", "32", "24", "16", "--sizes-per-step", "2",
    "--batch-size", "3", "--epochs", "4", "--lr", "0.05", "--ema", "0.5", "--mixup", "0.2", "--amp", "off",
    "--device", "cpu", "--workers", "1", "--log-interval", "1", "--wandb", "disabled",
)  # fmt: skip
EVALUATE = (
    "train_dali.py", "--data", "images", "--evaluate", "--batch-size", "6", "--amp", "off",
    "--device", "cpu", "--workers", "1",
)  # fmt: skip
PREDICT = ("rsnet", "predict", "release", "images/val", "--json", "--device", "cpu")
PREDICTED = ("--size 24", "--confidence 0.9999", "--tuned")
EXPORT = ("rsnet", "export", "release", "--format", "onnx", "--one-file", "--output", "onnx")

# What evaluation.json of each file was written by; the original code's files do not name the network.
ORIGINAL = ("--arch", "parallel_mobilenetv2", "--sizes", "32", "24")
EVALUATED = {
    "best.pt": (), "calibrated.pt": (), "weights.pt": (), "preact.pt": (), "original.pth.tar": ORIGINAL,
}  # fmt: skip


def run(checkout: Path, *words: str) -> tuple[int, str]:
    """A command line in this process, which starts in a moment: its exit code and stdout.

    words: a script of `checkout`, or the name of a package, and its arguments.
    """
    name, out = words[0], io.StringIO()
    with mock.patch.object(sys, "argv", list(words)), contextlib.redirect_stdout(out):
        try:
            if name.endswith(".py"):
                runpy.run_path(str(checkout / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return (end.code if isinstance(end.code, int) else int(bool(end.code))), out.getvalue()
    return 0, out.getvalue()


def tune(checkout: Path) -> tuple[str, ...]:
    """The command that tunes ./release, for which the sizes take 4, 2 and 1 ms whatever the machine."""
    # Latencies are stored where every batch takes as long.
    with mock.patch("time.perf_counter", side_effect=itertools.count(0, 1e-3)):
        assert run(checkout, *PREDICT, "--batch-size", "4", "--budget-ms", "1e6")[0] == 0
    (path,) = Path("release").glob("latency-*.json")
    content = json.loads(path.read_text())
    content["ms"] = {s: {"median": t, "p95": t} for s, t in (("32", 4.0), ("24", 2.0), ("16", 1.0))}
    path.write_text(json.dumps(content))
    words = ("--data", "images", "--target-top1", "100", "--device", "cpu", "--batch-size", "4")
    return ("rsnet", "tune", "release", *words)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums are added up in one order only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def machine() -> dict[str, str]:
    """On what the last bits of a result depend."""
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        known = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        vectors = (f for f in known.get("flags", "").split() if f.startswith(("avx", "amx", "fma")))
        named = (known[k] for k in ("vendor_id", "cpu family", "model", "model name") if k in known)
        cpu = ", ".join((*named, *vectors))
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "numba": numba.__version__,
        "vectors": capability,
        "cpu": cpu,
    }


def onnx_versions() -> dict[str, str]:
    """Of what exports a network, besides PyTorch."""
    return {name: importlib.metadata.version(name) for name in ("onnx", "onnxscript")}


def metrics(path: Path) -> list[dict[str, Any]]:
    """A run's metrics.jsonl without what depends on the time."""
    lines = map(json.loads, path.read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")}
        for line in lines
    ]


def predictions(printed: str) -> list[dict[str, Any]]:
    """What `predict --json` printed, without the time, in the order of the images."""
    lines = map(json.loads, printed.splitlines())
    kept = ({k: v for k, v in line.items() if k != "ms"} for line in lines)
    return sorted(kept, key=lambda line: str(line["image"]))


def pixels(size: int) -> Tensor:
    """Four images, (4, size, size, 3) uint8, that no decoder made."""
    return (torch.arange(4 * size * size * 3) ** 2 % 251).to(torch.uint8).view(4, size, size, 3)


def logits(folder: Path) -> dict[str, Mapping[str, list[list[float]]]]:
    """Of the release `folder`, of `pixels` of each size: of its network, and of a classifier."""
    from rsnet import release
    from rsnet.runtime import SwitchableClassifier

    network, classifier = release.load(folder), SwitchableClassifier.load(folder)
    found: dict[str, dict[str, list[list[float]]]] = {"network": {}, "classifier": {}}
    for size in (32, 24, 16):
        images = pixels(size).permute(0, 3, 1, 2) / 64 - 2
        with torch.no_grad():
            found["network"][str(size)] = network(images, size).tolist()
        found["classifier"][str(size)] = classifier.logits(pixels(size), size).tolist()
    return dict(found)

"""Forwards by ONNX Runtime, of the files that `rsnet export --format onnx` wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.utils.errors import DataError, UsageError, error_context, first_line
from pipelines.utils.schema import OBJECT, integer, list_of, one_of, pattern, require_fields
from rsnet.release import config as release_config
from rsnet.release.package import CONFIG, read_file

REPORT = "export.json"

_REPORT = {
    "format": one_of("onnx"),
    "dtype": one_of("float32", "int8"),
    "files": list_of("a list of objects", OBJECT),
}
_FILE = {
    "file": pattern("model.onnx or model-SIZE.onnx", r"model(-\d+)?\.onnx"),
    "sizes": list_of("a list of sizes", integer(1, 2**16)),
    "bytes": integer(1, 2**40),
    "sha256": pattern("64 hexadecimal digits", "[0-9a-f]{64}"),
}


class OnnxRunner:
    """Callable (N, 3, s, s) float32, s -> (N, classes), on the CPU; a file is read when its size is.

    config: what a release's config.json has. accuracy: by size, with "top1" in %; of int8 as it was measured
    at the export; None if it is not known. sizes: the exported ones, the largest first. sha256: of all
    files' hashes, as that of a release's weights.
    """

    def __init__(self, folder: Path) -> None:
        """Read what `folder` says of itself.

        Raises UsageError if it holds no export, or ONNX Runtime is not installed; DataError if a file is
        damaged.
        """
        require()
        report = _read_report(folder)
        with error_context(str(folder / CONFIG)):
            self.config = release_config.parse(read_file(folder, CONFIG, release_config.MAX_BYTES))
        self._files = {size: file for file in report["files"] for size in file["sizes"]}
        self.sizes = tuple(sorted(self._files, reverse=True))
        known = self.config["network"]["sizes"]
        if not self.sizes or not set(self.sizes) <= set(known):
            raise DataError(f"{folder / REPORT} has other sizes than {folder / CONFIG}")
        self.sha256 = _joint_hash(report["files"])
        self._folder, self._dtype = folder, report["dtype"]
        self.accuracy = self.config["accuracy"] if self._dtype == "float32" else _measured(report)
        self._sessions: dict[str, Any] = {}

    @property
    def conditions(self) -> dict[str, str | bool]:
        """Conditions, besides the device and the network, that the time of a forward depends on."""
        import onnxruntime

        engine = f"ONNX Runtime {onnxruntime.__version__}"
        return {"dtype": self._dtype, "fold": True, "cuda_graphs": False, "engine": engine}

    def __call__(self, images: Tensor, size: int) -> Tensor:
        """Compute logits. Raises DataError if the size's file is damaged."""
        file = self._files[size]
        name = file["file"]
        if name not in self._sessions:
            with error_context(str(self._folder / name)):
                self._sessions[name] = self._open(file)
        session = self._sessions[name]
        inputs: dict[str, Any] = {"images": images.contiguous().numpy()}
        if len(file["sizes"]) > 1:
            inputs["size"] = np.array(size)
        try:
            (logits,) = session.run(None, inputs)
        except Exception as error:  # ONNX Runtime has a class for each of its errors
            raise RuntimeError(first_line(error)) from error
        return torch.from_numpy(logits)

    def _open(self, file: Mapping[str, Any]) -> Any:
        import onnxruntime

        data = read_file(self._folder, file["file"], file["bytes"])
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            raise DataError(f"is damaged: its SHA-256 is not that in {REPORT}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a class for each of its errors
            raise DataError(f"ONNX Runtime does not take it ({first_line(error)})") from error


def is_export(folder: Path) -> bool:
    """Return whether a folder is what `rsnet export` wrote."""
    return (folder / REPORT).is_file()


def require() -> None:
    """Raise UsageError if ONNX Runtime is not installed."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise UsageError(
            '--engine onnxruntime: onnxruntime is not installed: pip install "rsnet-trainer[onnx]"'
        ) from None


def _read_report(folder: Path) -> dict[str, Any]:
    if not is_export(folder):
        raise UsageError(
            f"--engine onnxruntime: {folder} holds no {REPORT}; write a folder for it by "
            f"`rsnet export {folder} --format onnx --output DIR`"
        )
    with error_context(str(folder / REPORT)):
        try:
            report = json.loads(read_file(folder, REPORT, release_config.MAX_BYTES))
        except (ValueError, RecursionError) as error:
            raise DataError(f"is no JSON ({first_line(error)})") from error
        if not isinstance(report, dict) or report.get("format") != "onnx":
            raise UsageError("--engine onnxruntime computes exports of --format onnx alone")
        if "dtype" not in report:
            raise UsageError("is of an earlier version of rsnet; export the release again")
        require_fields(report, _REPORT)
        for file in report["files"]:
            require_fields(file, _FILE, "files.")
    return report


def _measured(report: dict[str, Any]) -> dict[str, dict[str, float]] | None:
    """Return the accuracies of int8, which are other than the network's; None while they are measured."""
    try:
        return {
            size: {"top1": float(found["int8"]["top1"])}
            for size, found in report["comparison"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _joint_hash(files: list[dict[str, Any]]) -> str:
    return hashlib.sha256(" ".join(file["sha256"] for file in files).encode()).hexdigest()

"""Variables that TensorFlow 1 saved: its checkpoints, and the `.npz` files that tensorpack makes of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.utils.errors import DataError, UsageError, first_line
from rsnet.models.safe_load import require_plain_zip

# tensorpack compresses its `.npz`; float32 weights become a tenth smaller by it, momentum of zeros vanishes.
MAX_COMPRESSION = 20


def read(path: Path, is_wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return {name: float32 value} of those variables whose names `is_wanted` picks; nothing is executed.

    path: a `.npz`, a checkpoint by its prefix (model-500000), or a folder of those: its latest.

    Raises UsageError if there is no such file, or no TensorFlow to read it with, DataError if it is damaged.
    """
    is_npz = path.suffix == ".npz"
    if not is_npz:
        path = _prefix(path)
    elif not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        if is_npz:
            require_plain_zip(path, growth=MAX_COMPRESSION)
        arrays = (_load_npz if is_npz else _load_checkpoint)(path, is_wanted)
        return {name: torch.tensor(np.asarray(v, np.float32)) for name, v in arrays.items()}
    except UsageError:
        raise
    except Exception as error:  # whatever a damaged file makes of the readers
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def is_tf_checkpoint(path: Path) -> bool:
    """Return whether a path names something that `read` takes, however damaged it is."""
    if path.is_dir():
        return any(path.glob("*.index"))
    return path.suffix == ".npz" or _is_checkpoint(_without_suffix(path))


def _prefix(path: Path) -> Path:
    """Return the checkpoint that is meant: PREFIX of PREFIX.index and PREFIX.data-00000-of-00001."""
    if path.is_dir():
        return _latest(path)
    prefix = _without_suffix(path)
    if not _is_checkpoint(prefix):
        raise UsageError(f"there is no checkpoint {path}: no file {prefix.name}.index")
    return prefix


def _latest(folder: Path) -> Path:
    """Return what the file `checkpoint` names, wherever the folder was then; else the highest step's."""
    notes = folder / "checkpoint"
    text = notes.read_text(errors="replace") if notes.is_file() else ""
    named = re.search(r'^model_checkpoint_path: "(?:.*/)?(.+)"', text, re.MULTILINE)
    if named and _is_checkpoint(folder / named[1]):
        return folder / named[1]
    found = [re.fullmatch(r"model-(\d+)\.index", path.name) for path in folder.iterdir()]
    steps = [int(m[1]) for m in found if m]
    if not steps:
        raise UsageError(f"there is no checkpoint in {folder}: no file model-STEP.index")
    return folder / f"model-{max(steps)}"


def _without_suffix(path: Path) -> Path:
    return path.with_name(re.sub(r"\.(index|data-\d+-of-\d+)$", "", path.name))


def _is_checkpoint(prefix: Path) -> bool:
    return prefix.with_name(prefix.name + ".index").is_file()


def _load_npz(path: Path, is_wanted: Callable[[str], bool]) -> dict[str, Any]:
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        names = {name.removesuffix(":0"): name for name in file}  # of the variable or of its output
        return {short: file[name] for short, name in names.items() if is_wanted(short)}


def _load_checkpoint(prefix: Path, is_wanted: Callable[[str], bool]) -> dict[str, Any]:
    # Else it tells how it was built.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    # It brings Triton, whose LLVM aborts the process if TensorFlow's (2.21) was loaded before.
    import torchvision  # noqa: F401

    try:
        import tensorflow
    except ImportError:
        raise UsageError(
            f'{prefix}: TensorFlow, which reads it, is not installed: pip install "rsnet-trainer[tensorflow]"'
        ) from None
    reader = tensorflow.train.load_checkpoint(str(prefix))
    names = filter(is_wanted, reader.get_variable_to_shape_map())
    return {name: reader.get_tensor(name) for name in names}

"""Checkpoints: written atomically with a SHA-256 beside them, read strictly and without pickled code."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from pipelines.batch import EVAL_CROP_RATIO
from pipelines.errors import DataError, UsageError
from rsnet.config import ResolvedConfig
from rsnet.models.switchable import ResolutionSwitchable, select_sizes

FORMAT = 1


def describe(config: ResolvedConfig, classes: list[str], num_classes: int) -> dict[str, Any]:
    """What a checkpoint says of its network, so that it can be rebuilt and fed from the file alone."""
    return {
        "arch": config.arch,
        "width_mult": config.width_mult,
        "sizes": list(config.sizes),
        "num_classes": num_classes,
        "classes": classes,
        "normalize": config.normalize,
        "eval_crop_ratio": EVAL_CROP_RATIO,
        "interpolation": "triangle, antialiased (PIL's BILINEAR)",
    }


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` (tensors, plain dicts, lists, numbers, strings) to `path`, whole or not at all.

    PATH.sha256 names the hash of the new file and that of the one it replaces, because two files
    cannot be renamed at once: a crash in between leaves an old file that is still known.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    data = buffer.getbuffer()
    hashes = [hashlib.sha256(data).hexdigest()]
    if path.exists():
        hashes.append(_sha256(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(_hash_file(path), "".join(f"{h}  {path.name}\n" for h in hashes).encode())
    _replace(path, data)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project onto the CPU; nothing in it is executed.

    Raises UsageError if there is no such file, DataError if its hash or its content is not right.
    """
    if not path.is_file():
        raise UsageError(f"--resume: there is no checkpoint {path}")
    if _hash_file(path).is_file() and _sha256(path) not in _hash_file(path).read_text().split():
        raise DataError(
            f"--resume: {path} is damaged: its SHA-256 is not in {_hash_file(path).name}"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it is empty"
        raise DataError(f"--resume: {path} is no readable checkpoint: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"--resume: {path} is no checkpoint of this trainer (format {FORMAT})")
    return content


def require_match(
    trained: Mapping[str, Any], wanted: Mapping[str, Any], path: Path, training: bool
) -> None:
    """Raise UsageError if a network `wanted` cannot take over the weights of one `trained`.

    Training goes on with the same arch, classes and sizes; an evaluation may take some of the sizes.
    """
    problems = []
    for field, flag in (
        ("arch", "--arch"),
        ("width_mult", "--width-mult"),
        ("num_classes", "--num-classes"),
    ):
        if trained[field] != wanted[field]:
            problems.append(f"{flag} is {trained[field]} there and {wanted[field]} here")
    if not problems and trained["classes"] != wanted["classes"]:
        pairs = zip_longest(trained["classes"], wanted["classes"], fillvalue="missing")
        i, (there, here) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        problems.append(f"--data has other classes: class {i} is {there} there and {here} here")
    same = set(trained["sizes"]) == set(wanted["sizes"])
    subset = set(wanted["sizes"]) <= set(trained["sizes"])
    if not (same if training else subset):
        there, here = (" ".join(map(str, x["sizes"])) for x in (trained, wanted))
        problems.append(f"--sizes is {there} there and {here} here")
    if problems:
        raise UsageError(f"--resume: {path} does not fit: {'; '.join(problems)}")


def load_weights(model: ResolutionSwitchable, content: Mapping[str, Any]) -> None:
    """Load a checkpoint's weights, strictly, each BatchNorm by its size.

    Raises DataError that names the parameters which are missing, left over or of another shape.
    """
    state = select_sizes(content["model"], content["network"]["sizes"], model.sizes)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"--resume: the weights do not fit the network: {reason}") from error


def _replace(path: Path, data: Any) -> None:
    """Write a file under another name and rename it, so that `path` is never half written."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Checkpoints: written atomically with a SHA-256 beside them, read strictly and without pickled code."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch

from pipelines.utils.atomic_io import atomic_write, sha256_file
from pipelines.utils.errors import DataError, UsageError, error_context
from rsnet.checkpoint import authors_pytorch as original
from rsnet.config.model_config import FULL, MODEL_DEFAULTS, WEIGHT_FIELDS
from rsnet.models import safe_load as torch_file
from rsnet.models.quantization.lq_nets import full_precision_names, init_quantizers_from_weights
from rsnet.models.state_dict import select_sizes
from rsnet.models.switchable import ResolutionSwitchable

FORMAT = 1

# What a run begins with, if the file that it starts from holds weights and nothing of a run.
NEW_RUN: dict[str, Any] = {
    "config": {}, "global_batch": None, "loader": None, "epoch": 0, "done": 0, "step": 0, "best": [],
    "wandb_id": None,
}  # fmt: skip


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` (tensors, plain dicts, lists, numbers, strings) to `path`, whole or not at all.

    PATH.sha256 names the hash of the new file and that of the one it replaces, because two files
    cannot be renamed at once: a crash in between leaves an old file that is still known.
    """
    data = _serialized({"format": FORMAT, **content})
    path.parent.mkdir(parents=True, exist_ok=True)
    older = [sha256(path)] if path.exists() else []
    note_hashes(path, [hashlib.sha256(data).hexdigest(), *older])
    atomic_write(path, data)


def note_hashes(path: Path, known: Sequence[str]) -> None:
    """Write PATH.sha256: what `path` may be."""
    lines = [f"{known_hash}  {path.name}\n" for known_hash in dict.fromkeys(known)]
    atomic_write(_hash_file(path), "".join(lines).encode())


def remove(path: Path) -> None:
    """Delete a checkpoint and its hashes."""
    path.unlink()
    _hash_file(path).unlink(missing_ok=True)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """`torch.save`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, _serialized(content))


def load(path: Path, arch: str | None = None, sizes: Sequence[int] | None = None) -> dict[str, Any]:
    """Read a checkpoint, of this project or of the original code, onto the CPU; nothing in it is executed.

    arch, sizes: what an original's file may not say of its network, see `rsnet.checkpoint.authors_pytorch`.

    Raises UsageError if there is no such file, DataError if its hash or its content is not right.
    """
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}")
    hash_file = _hash_file(path)
    # Before and after, because a run that goes on may put another file there in between.
    known, found = _noted_hashes(path), sha256_file(path)
    known += _noted_hashes(path)
    if known and found not in known:
        raise DataError(f"{path} is damaged: its SHA-256 is not in {hash_file.name}")
    with error_context(f"{path} is no readable checkpoint"):
        content: Any = torch_file.safe_load(path)
    if original.is_original(content):
        with error_context(str(path)):
            return NEW_RUN | original.from_original(content, arch, sizes)
    ours = isinstance(content, dict) and content.get("format") == FORMAT
    if not ours or not {"network", "model"} <= content.keys():
        raise DataError(f"{path} is no checkpoint of this trainer (format {FORMAT})")
    return {**NEW_RUN, **content}


def require_match(trained: Mapping[str, Any], wanted: Mapping[str, Any], training: bool) -> None:
    """Raise UsageError if a network `wanted` cannot take over the weights of one `trained`.

    Training goes on with the same arch, classes and sizes; an evaluation may take some of the sizes.
    """
    problems = []
    for field in WEIGHT_FIELDS:
        there, here = (x.get(field, MODEL_DEFAULTS.get(field)) for x in (trained, wanted))
        if there != here:
            flag = "--" + field.replace("_", "-")
            is_start = field in ("qw", "qa") and there == FULL and training
            how = "; to start from it in full precision, give it to --init-from" if is_start else ""
            problems.append(f"{flag} is {there} there and {here} here{how}")
    # The original's files do not name their classes.
    if not problems and trained["classes"] and trained["classes"] != wanted["classes"]:
        pairs = zip_longest(trained["classes"], wanted["classes"], fillvalue="missing")
        i, (there, here) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        problems.append(f"--data has other classes: class {i} is {there} there and {here} here")
    same = set(trained["sizes"]) == set(wanted["sizes"])
    subset = set(wanted["sizes"]) <= set(trained["sizes"])
    if not (same if training else subset):
        there, here = (" ".join(map(str, x["sizes"])) for x in (trained, wanted))
        problems.append(f"--sizes is {there} there and {here} here")
    if problems:
        raise UsageError("; ".join(problems))


def load_weights(
    model: ResolutionSwitchable, content: Mapping[str, Any], key: Literal["model", "ema"] = "model"
) -> None:
    """Load a checkpoint's weights, or their averages, strictly, each BatchNorm by its size.

    Raises DataError that names the parameters which are missing, left over or of another shape.
    """
    state = select_sizes(content[key], content["network"]["sizes"], model.sizes, model.shared_norm)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DataError(reason) from error


def start_from(model: ResolutionSwitchable, wanted: Mapping[str, Any], path: Path) -> None:
    """Give `model`, described by `wanted`, the weights of a full-precision checkpoint, or their averages.

    Raises UsageError if that is not of the same network, or quantized itself; DataError if it is damaged.
    """
    with error_context("--init-from"):
        content = load(path)
    trained = content["network"]
    bits = {name: wanted[name] for name in ("qw", "qa")}
    with error_context(f"--init-from: {path} does not fit"):
        if any(trained.get(name, FULL) != FULL for name in bits):
            raise UsageError("it is quantized itself; --resume goes on with it")
        require_match({**trained, **bits}, wanted, training=False)
        there, here = trained["normalize"], wanted["normalize"]
        if there != here:
            raise UsageError(f"--normalize is {there} there and {here} here")
        names = full_precision_names(model)
        weights = {names.get(k, k): v for k, v in content.get("ema", content["model"]).items()}
        own = {k: v for k, v in model.state_dict().items() if k not in names.values()}
        load_weights(model, {"network": trained, "model": {**own, **weights}})
    model.complete_alpha()
    init_quantizers_from_weights(model)


def _serialized(content: Mapping[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getbuffer()


def _noted_hashes(path: Path) -> list[str]:
    hash_file = _hash_file(path)
    return hash_file.read_text().split() if hash_file.is_file() else []


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def sha256(path: Path) -> str:
    """The hash of a file that this process wrote or read; the same content is not read twice."""
    stat = path.stat()
    identity = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns  # the same of a hard link
    if identity not in _HASHED:
        _HASHED[identity] = sha256_file(path)
    return _HASHED[identity]


_HASHED: dict[tuple[int, ...], str] = {}

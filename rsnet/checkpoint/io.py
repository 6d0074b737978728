"""Checkpoints: written atomically with a SHA-256 beside them, read strictly and without pickled code."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.utils.atomic_io import atomic_write, sha256_file
from pipelines.utils.errors import DataError, UsageError, error_context
from rsnet.checkpoint import authors_pytorch as original
from rsnet.checkpoint.checkpoint import FORMAT, Checkpoint
from rsnet.config.model_rules import require_network
from rsnet.models.safe_load import safe_load


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint to `path`, whole or not at all.

    PATH.sha256 names the hash of the new file and that of the one it replaces, because two files
    cannot be renamed at once: a crash in between leaves an old file that is still known.

    Raises DataError, before anything is written, for a network that `load` would refuse.
    """
    require_network(checkpoint.network.to_dict(), "network.")
    data = _serialized(checkpoint.to_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    older = [sha256(path)] if path.exists() else []
    note_hashes(path, [hashlib.sha256(data).hexdigest(), *older])
    atomic_write(path, data, alone=True)


def note_hashes(path: Path, known: Sequence[str]) -> None:
    """Write PATH.sha256, the hashes that the content of `path` may have."""
    lines = [f"{known_hash}  {path.name}\n" for known_hash in dict.fromkeys(known)]
    atomic_write(_hash_file(path), os.fsencode("".join(lines)))


def remove(path: Path) -> None:
    """Delete a checkpoint and its hashes."""
    path.unlink()
    _hash_file(path).unlink(missing_ok=True)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write by `torch.save`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, _serialized(content), alone=True)


def load(path: Path, arch: str | None = None, sizes: Sequence[int] | None = None) -> Checkpoint:
    """Read a checkpoint, of this project or of the original code, onto the CPU; nothing in it is executed.

    arch, sizes: what an original's file may not say of its network, see `rsnet.checkpoint.authors_pytorch`.

    Raises UsageError if there is no such file, DataError if its hash or its content is not right.
    """
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}")
    hash_file = _hash_file(path)
    # Before and after, because a running training may replace the file in between.
    known, found = _noted_hashes(path), sha256_file(path)
    known += _noted_hashes(path)
    if known and found not in known:
        raise DataError(f"{path} is damaged: its SHA-256 is not in {hash_file.name}")
    with error_context(f"{path} is no readable checkpoint"):
        content: Any = safe_load(path)
    if original.is_original(content):
        with error_context(str(path)):
            return original.from_original(content, arch, sizes)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is no checkpoint of this trainer (format {FORMAT})")
    with error_context(f"{path} is no checkpoint of this trainer"):
        return Checkpoint.from_dict(content)


def _serialized(content: Mapping[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getbuffer()


def _noted_hashes(path: Path) -> list[str]:
    hash_file = _hash_file(path)
    return os.fsdecode(hash_file.read_bytes()).split() if hash_file.is_file() else []


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def sha256(path: Path) -> str:
    """Return the hash of a file that this process wrote or read; the same content is not read twice."""
    stat = path.stat()
    identity = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns  # the same of a hard link
    if identity not in _HASHED:
        _HASHED[identity] = sha256_file(path)
    return _HASHED[identity]


_HASHED: dict[tuple[int, ...], str] = {}

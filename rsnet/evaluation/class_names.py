"""Readable names of classes: from a file, or, of ImageNet's WordNet ids, from libraries that know them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.utils.errors import DataError, UsageError
from pipelines.utils.schema import parsing

IMAGENET_CLASSES = 1000
# SHA-256 of the 1000 WordNet ids of ILSVRC 2012, sorted and joined by line breaks: torchvision has their
# names in this order, but not the ids.
_IMAGENET_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
_MOST_BYTES = 64 * 2**20


def are_wordnet_ids(classes: Sequence[str]) -> bool:
    """Return whether all names are ids of WordNet's nouns, as n01440764."""
    return bool(classes) and all(re.fullmatch(r"n[0-9]{8}", name) for name in classes)


def are_imagenets(classes: Sequence[str]) -> bool:
    """Return whether the names are the ids of ImageNet's 1000 classes, in their order."""
    return hashlib.sha256("\n".join(classes).encode()).hexdigest() == _IMAGENET_SHA256


def imagenet_ids() -> Sequence[str] | None:
    """Return the WordNet ids of ImageNet's 1000 classes, in their order; None if timm is not installed."""
    try:
        from timm.data.imagenet_info import ImageNetInfo  # seconds
    except ModuleNotFoundError:
        return None
    ids: list[str] = ImageNetInfo("imagenet-1k").label_names()  # type: ignore[no-untyped-call]
    return ids


def readable_names(classes: Sequence[str], num_classes: int, file: Path | None) -> tuple[str, ...]:
    """Return the name of each output of a network.

    classes: the names of its first outputs, as its data's folders have them. file: names them, see
    `read_names`. Without one, WordNet ids of ImageNet's classes get torchvision's names; of some of them
    only if timm is installed, which knows the ids. An output without any name goes by its number.

    Raises UsageError or DataError for a file that does not fit.
    """
    own = [*classes, *map(str, range(len(classes), num_classes))]
    if file is not None:
        return tuple(read_names(file, own, len(classes) or num_classes))
    known = _imagenet_names(classes) if are_wordnet_ids(classes) else {}
    return tuple(known.get(name, name) for name in own)


def read_names(file: Path, own: Sequence[str], needed: int) -> list[str]:
    """Read the readable names of the outputs `own`, of which the first `needed` must have one.

    Lines, or a list of JSON: the names in the order of the outputs. A dict of JSON, or lines that begin with
    a WordNet id (ImageNet's LOC_synset_mapping.txt): by the class's name or by the output's number; a value
    may be a list that ends with the name (Keras' imagenet_class_index.json).

    Raises UsageError if there is no such file, or it does not name the classes; DataError if it is damaged.
    """
    if not file.is_file():
        raise UsageError(f"--class-names: there is no file {file}")
    if file.stat().st_size > _MOST_BYTES:
        raise DataError(f"{file} has more than {_MOST_BYTES >> 20} MB; it is to name classes")
    found = _parsed(file)
    if isinstance(found, list):
        if len(found) not in (needed, len(own)):
            raise UsageError(
                f"--class-names: {file} has {len(found)} names, and the network {needed} classes"
            )
        return [*found, *own[len(found) :]]
    names = [found.get(name, found.get(str(output))) for output, name in enumerate(own)]
    for name, readable in zip(own[:needed], names, strict=False):
        if readable is None:
            raise UsageError(f"--class-names: {file} does not name the class {name}")
    return [readable or name for readable, name in zip(names, own, strict=True)]


def _parsed(file: Path) -> list[str] | dict[str, str]:
    """Return names in order, or by class."""
    with parsing(file, "it is to have a name a line, or JSON"):
        text = file.read_bytes().decode("utf-8-sig")  # Windows' editors begin with a mark
        if file.suffix.lower() == ".json":
            content: Any = json.loads(text)
            if isinstance(content, dict):
                return {key: _name(value) for key, value in content.items()}
            return [_name(value) for value in content]
        lines = [line.strip() for line in text.splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        if "" in lines:
            raise ValueError(f"line {lines.index('') + 1} is empty")
        parts = [line.split(maxsplit=1) for line in lines]
        if lines and all(len(part) == 2 and are_wordnet_ids(part[:1]) for part in parts):
            return dict(parts)
        return lines


def _name(value: Any) -> str:
    """Return a name of a JSON file. Raises ValueError, which names what is none."""
    if isinstance(value, list) and value:
        value = value[-1]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is no name")
    return value


def _imagenet_names(classes: Sequence[str]) -> Mapping[str, str]:
    """Return torchvision's names of those WordNet ids that are known to be of ImageNet's 1000 classes."""
    from torchvision.models import ResNet50_Weights

    ids: Sequence[str] | None = classes
    if not are_imagenets(classes):
        ids = imagenet_ids()
    return dict(zip(ids or (), ResNet50_Weights.DEFAULT.meta["categories"], strict=False))

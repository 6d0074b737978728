"""Labels of other data than a network was trained on: some of its classes, numbered ones, ImageNet-ReaL's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.utils.errors import DataError, UsageError
from pipelines.utils.schema import integer, list_of, read_json, require
from pipelines.utils.text import distinct, first_names
from rsnet.evaluation.class_names import (
    IMAGENET_CLASSES,
    are_imagenets,
    are_wordnet_ids,
    imagenet_ids,
)

_ILSVRC_NAME = re.compile(
    r"ILSVRC2012_val_([0-9]{8})(\.[^./]+)?$"
)  # tar shards leave the suffix out


@dataclass(frozen=True)
class LabelSet:
    """Mapping from the labels of the data to the outputs of a network.

    outputs: (K,) the output of each class of the data.
    among: (M,) the outputs that an answer is chosen among, ascending; None for all of the network.
    classes: the names of the first outputs; none if they are not known.
    how: how the labels were understood, for the user; "" if data and network have the same classes.
    """

    outputs: Tensor
    among: Tensor | None
    classes: tuple[str, ...]
    how: str

    @property
    def positions(self) -> Tensor:
        """(K,) where the output of each class of the data is in `among`."""
        return self.outputs if self.among is None else torch.searchsorted(self.among, self.outputs)


def match_classes(data: Sequence[str], network: Sequence[str], num_classes: int) -> LabelSet:
    """Find the outputs of a network for the classes of data, by the names of both.

    network: the names of its first outputs; none of a file of the original code. If the data lacks some of
    the classes, answers are chosen among those that it has (as for ImageNet-A and -R): the most likely one
    of the subset, and softmax over its logits alone. Folders that are numbers (ImageNet-V2's) are outputs.

    Raises UsageError if a class of the data is none of the network's.
    """
    if network and set(data) <= set(network):
        return _label_set(data, network, "")
    if _are_numbers(data):
        how = f"the class folders are numbers: outputs of the network, which has 0 to {num_classes - 1}"
        return _numbered(data, network, num_classes, how)
    unnamed = "the network does not name its classes: they are taken to be"
    if not network and len(data) == num_classes:
        return _label_set(data, data, f"{unnamed} the folders, in the order of their names")
    if not network and num_classes == IMAGENET_CLASSES and are_wordnet_ids(data):
        known = _imagenet_ids()
        if set(data) <= set(known):
            return _label_set(data, known, f"{unnamed} ImageNet's")
    if not network:
        raise UsageError(
            f"--data has {len(data)} classes, and the network {num_classes} that it does not name; name the "
            "folders by their outputs, 0 and so on"
        )
    unknown = [distinct(name) for name in data if name not in set(network)]
    raise UsageError(
        f"--data has classes that are none of the network's {len(network)}: {first_names(unknown)}"
    )


def any_labels(data: Sequence[str], network: Sequence[str], num_classes: int) -> LabelSet:
    """Return the label set of data whose labels are not used, as with ImageNet-ReaL's."""
    names_outputs = len(data) == num_classes and not _are_numbers(data)
    classes = network or (data if names_outputs else ())
    return LabelSet(torch.zeros(len(data), dtype=torch.int64), None, tuple(classes), "")


def _are_numbers(names: Sequence[str]) -> bool:
    return all(re.fullmatch(r"[0-9]{1,9}", name) for name in names)


def _label_set(data: Sequence[str], network: Sequence[str], how: str) -> LabelSet:
    """Find classes of the data by name."""
    output_of = {name: output for output, name in enumerate(network)}
    return _among([output_of[name] for name in data], len(network), network, how)


def _among(outputs: list[int], known: int, classes: Sequence[str], how: str) -> LabelSet:
    found = torch.tensor(outputs)
    if len(outputs) == known:
        return LabelSet(found, None, tuple(classes), how)
    subset = f"the data has {len(outputs)} of {known} classes: answers are chosen among these"
    among = found.sort().values
    return LabelSet(found, among, tuple(classes), "; ".join(filter(None, (how, subset))))


def _numbered(data: Sequence[str], network: Sequence[str], num_classes: int, how: str) -> LabelSet:
    """Take the folders' names for outputs."""
    numbers = [int(name) for name in data]
    if max(numbers) >= num_classes:
        raise UsageError(
            f"--data has a class folder {max(numbers)}, and the network the outputs 0 to {num_classes - 1}"
        )
    if len(set(numbers)) < len(numbers):
        raise UsageError("--data has two class folders of the same number")
    return _among(numbers, num_classes, network, how)


def _imagenet_ids() -> Sequence[str]:
    ids = imagenet_ids()
    if ids is None:
        raise UsageError(
            "--data has some of ImageNet's classes, and the network does not name its own: timm knows their "
            'order: pip install "rsnet-trainer[timm]"'
        )
    return ids


def read_real(path: Path) -> list[list[int]]:
    """Read ImageNet-ReaL's labels (Beyer et al. 2020): a list for each of ILSVRC's validation images.

    Raises DataError if the file holds something else.
    """
    remedy = "it is to be real.json of google-research/reassessed-imagenet"
    found: Any = read_json(path, remedy)
    rule = list_of("a list of lists of classes", list_of("", integer(0, IMAGENET_CLASSES - 1)))
    try:
        require("its content", rule, found)
    except DataError as error:
        raise DataError(f"{path} is damaged ({error}); {remedy}") from error
    return [list(labels) for labels in found]


def real_labels(
    paths: Sequence[str], real: Sequence[Sequence[int]], classes: Sequence[str], num_classes: int
) -> NDArray[np.int64]:
    """Return the labels of each image, found by its ILSVRC name, (N, L): -1 in place of those it has not.

    classes: the network's names of its classes. ReaL's labels are indices of ImageNet's classes in the order
    of their WordNet ids, which a network's outputs have unless it was trained on folders 0 to 999.

    Raises UsageError if an image has another name, none has a label, or the network has other outputs.
    """
    output_of = _imagenet_outputs(classes, num_classes)
    rows = [real[_real_index(path, len(real))] for path in paths]
    largest = max((label for row in rows for label in row), default=-1)
    if largest < 0:
        raise UsageError("--real: none of the images has a label")
    if largest >= len(output_of):
        raise UsageError(
            f"--real: labels go up to {largest}, and the network has the outputs 0 to {num_classes - 1}"
        )
    labels = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for i, row in enumerate(rows):
        labels[i, : len(row)] = [output_of[label] for label in row]
    return labels


def _imagenet_outputs(classes: Sequence[str], num_classes: int) -> list[int]:
    """Return the outputs of ImageNet's classes, in their order. Raises UsageError for other classes."""
    if not classes:  # a file of the original code
        return list(range(num_classes))
    if _are_numbers(classes):
        return [int(output) for output in np.argsort([int(name) for name in classes])]
    if are_imagenets(classes):
        return list(range(len(classes)))
    known = imagenet_ids() if are_wordnet_ids(classes) else None
    if known is None or not {*known} <= {*classes}:
        raise UsageError(
            "--real: the network's classes are not ImageNet's, by their WordNet ids (n01440764); of networks "
            'with more classes than these, timm knows the order: pip install "rsnet-trainer[timm]"'
        )
    place = {name: output for output, name in enumerate(classes)}
    return [place[name] for name in known]


def _real_index(path: str, known: int) -> int:
    found = _ILSVRC_NAME.search(path)
    if found is None or not 1 <= int(found[1]) <= known:
        raise UsageError(
            f"--real has labels of ILSVRC2012_val_00000001.JPEG to {known:08}, and none of {path}; give the "
            "folder of ImageNet's own validation images"
        )
    return int(found[1]) - 1

"""What a training sample weighs in the loss, and how often it is drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.utils.errors import UsageError
from pipelines.utils.schema import OBJECT, dict_of, number, parsing, require
from pipelines.utils.text import distinct, first_names

BALANCED = "balanced"
MOST = 1e6  # of a class


def loss_weights(
    labels: NDArray[np.int64],
    classes: Sequence[str],
    own: NDArray[np.float64] | None,
    class_weights: str | None,
    balanced: bool = False,
) -> NDArray[np.float32] | None:
    """Return the weight of each training sample in the loss, (N,), with mean 1 over an epoch; None if all are
    equal.

    A sample's is its own times its class's. own: (N,), of the source. class_weights: "balanced", the inverse
    of each class's images, as scikit-learn's; or a JSON file, {class: weight}; or None. They are scaled by
    the whole training set, not by each batch as in `torch.nn.CrossEntropyLoss`, so that batches accumulated
    or spread over processes give the gradient of one large batch. balanced: whether an epoch draws of each
    class as often as of any other.

    Raises UsageError if the file lacks a class, DataError if it is damaged.
    """
    if own is None and class_weights is None:
        return None
    weights = np.ones(len(labels)) if own is None else own
    counts = np.bincount(labels, minlength=len(classes))
    if class_weights == BALANCED:
        weights = weights / counts[labels]
    elif class_weights is not None:
        weights = weights * _read(Path(class_weights), classes)[labels]
    mean = np.average(weights, weights=1 / counts[labels] if balanced else None)
    scaled: NDArray[np.float32] = (weights / mean).astype(np.float32)
    return scaled


def _read(path: Path, classes: Sequence[str]) -> NDArray[np.float64]:
    """Return the weight of each class."""
    if not path.exists():
        raise UsageError(
            f"--class-weights: there is no file {path}; {BALANCED}, a JSON file, or none"
        )
    with parsing(path, "expected {class: weight}"):
        found = json.loads(path.read_bytes())
        require("it", OBJECT, found)
        require("it", dict_of("an object of weights above 0", number(1e-6, MOST)), found)
    missing = [name for name in classes if name not in found]
    unknown = sorted(set(found) - set(classes))
    if missing or unknown:
        names = first_names([distinct(name) for name in missing or unknown])
        what = "has no weight of" if missing else "has weights of classes that the data has not:"
        raise UsageError(f"--class-weights: {path} {what} {names}")
    return np.array([found[name] for name in classes], np.float64)

"""A network's predictions for each image at each size, gathered from all ranks and written as Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Loader
from pipelines.utils.atomic_io import atomic_write
from pipelines.utils.errors import RunError
from pipelines.utils.text import encodable
from rsnet.distributed import process_group as distributed
from rsnet.evaluation.evaluate import Accuracy, batch_logits
from rsnet.evaluation.label_sets import LabelSet
from rsnet.evaluation.report import Results
from rsnet.losses import ensemble_logits
from rsnet.models.switchable import ResolutionSwitchable

TOP = 5  # answers that are kept


@dataclass(frozen=True)
class Predictions:
    """The answers for N images by R results: each size, the largest first, and the ensemble.

    names: R. paths: N. labels: (N, L) outputs; of several labels each is right, -1 stands for none.
    classes: (N, R, K) the most likely outputs, and probabilities: (N, R, K). logits: (N, R, C), or None.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32] | None = None

    @property
    def hits(self) -> NDArray[np.bool_]:
        """(N, R, K) whether an answer is one of the image's labels."""
        found: NDArray[np.bool_] = np.zeros(self.classes.shape, bool)
        for labels in self.labels.T:
            found |= self.classes == labels[:, None, None]
        return found

    def with_labels(self, labels: NDArray[np.int64]) -> Predictions:
        """Return these predictions for other labels, (N, L), without the images that have none."""
        rows = np.flatnonzero((labels >= 0).any(axis=1))
        return replace(
            self,
            paths=tuple(self.paths[row] for row in rows),
            labels=labels[rows],
            classes=self.classes[rows],
            probabilities=self.probabilities[rows],
            logits=None if self.logits is None else self.logits[rows],
        )


@torch.no_grad()
def predict(
    model: ResolutionSwitchable,
    loader: Loader,
    labels: LabelSet,
    device: torch.device,
    amp: torch.dtype | None,
    *,
    keep_logits: bool = False,
    on_images: Callable[[int], None] = lambda _: None,
) -> tuple[Predictions | None, Results]:
    """Compute the answers for all images of `loader`, in one pass: of all ranks, and on rank 0 alone.

    Returns top-1, top-5 and loss as well, which `evaluate` counts alike. on_images: is told after each batch
    how many images this rank has done. keep_logits: they take 4 bytes x images x classes x (sizes + 1) of
    rank 0's memory.

    Raises RunError if outputs are not finite.
    """
    accuracy = Accuracy(model.sizes, device)
    outputs, positions = labels.outputs.to(device), labels.positions.to(device)
    among = None if labels.among is None else labels.among.to(device)
    parts: list[list[Tensor]] = []
    done = 0
    for sizes, batch_labels in batch_logits(model, loader, device, amp):
        every = [*sizes, ensemble_logits(sizes, model.alpha)]
        chosen = [z if among is None else z[:, among] for z in sizes]
        accuracy.add(chosen, positions[batch_labels], model.alpha)
        stacked = torch.stack([z.float() for z in every], dim=1)
        considered = stacked if among is None else stacked[..., among]
        likely = considered.softmax(dim=2)
        top = considered.topk(min(TOP, considered.shape[2]), dim=2).indices
        kept = [
            outputs[batch_labels], top if among is None else among[top], likely.gather(2, top)
        ]  # fmt: skip
        parts.append([*kept, stacked.cpu()] if keep_logits else kept)
        done += len(batch_labels)
        on_images(done)
    results = accuracy.compute()
    gathered = distributed.gather_object([_joined(column) for column in zip(*parts, strict=True)])
    if not distributed.is_main():
        return None, results
    ranks = [rank for rank in gathered if rank]  # one may have had no image
    columns = [np.concatenate(column) for column in zip(*ranks, strict=True)]
    found = Predictions(
        tuple(accuracy.names), tuple(loader.sample_names), columns[0][:, None], *columns[1:]
    )
    _require_finite(found)
    return found, results


def _joined(parts: Sequence[Tensor]) -> NDArray[Any]:
    return torch.cat(list(parts)).cpu().numpy()


def _require_finite(predictions: Predictions) -> None:
    wrong = ~np.isfinite(predictions.probabilities).all(axis=2)
    if wrong.any():
        image, result = (int(index) for index in np.argwhere(wrong)[0])
        raise RunError(
            f"{predictions.paths[image]}: outputs at size {predictions.names[result]} are not finite; try "
            "--amp off, or another checkpoint"
        )


def write_parquet(
    path: Path, predictions: Predictions, class_names: Sequence[str], source: Mapping[str, Any]
) -> None:
    """Write a row per image: path, label, and at each size the most likely classes or the logits.

    `class_names` and `source` are in the schema's metadata under "rsnet", as JSON. Raises OSError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = predictions.labels
    columns: dict[str, Any] = {
        "path": pa.array([encodable(path) for path in predictions.paths]),
        "label": pa.array(labels[:, 0])
        if labels.shape[1] == 1
        else pa.array([row[row >= 0] for row in labels], pa.list_(pa.int64())),
    }
    for index, name in enumerate(predictions.names):
        if predictions.logits is not None:
            columns[f"logits@{name}"] = _lists(pa, predictions.logits[:, index])
        else:
            columns[f"classes@{name}"] = _lists(pa, predictions.classes[:, index])
            columns[f"probabilities@{name}"] = _lists(pa, predictions.probabilities[:, index])
    about = {**source, "classes": list(map(encodable, class_names))}
    table = pa.table(columns).replace_schema_metadata({"rsnet": json.dumps(about)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    atomic_write(path, memoryview(sink.getvalue()))


def _lists(pa: Any, rows: NDArray[Any]) -> Any:
    """Return (N, K) as N lists of K."""
    return pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(rows).ravel(), rows.shape[1])

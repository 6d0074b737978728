"""An evaluation with all its figures: as tables, as JSON, and as a folder of files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import Loaders
from pipelines.utils.atomic_io import atomic_directory, atomic_write_json
from pipelines.utils.tables import text_table
from rsnet.config.model_config import ModelConfig
from rsnet.evaluation import metrics
from rsnet.evaluation.confusion_plot import plot
from rsnet.evaluation.label_sets import any_labels, match_classes, read_real, real_labels
from rsnet.evaluation.metrics import Confusion
from rsnet.evaluation.predictions import Predictions, predict
from rsnet.evaluation.report import Results
from rsnet.models.switchable import ResolutionSwitchable

SHOWN = 10  # rows of a table on the console
LISTED = 100  # confusions in JSON; confusion.csv has all

COLUMNS: list[str | int] = ["size", "top1", "top5", "loss", "ece"]


@dataclass(frozen=True)
class DetailedEvaluation:
    """A network's predictions for labelled images, and the metrics derived from them.

    source: what was evaluated, and on what, for the reader. results: "top1", "top5" and "ece" in %, and,
    unless images have several labels, "loss". classes: the outputs by the names of their folders; names: as
    they are read.
    """

    source: dict[str, Any]
    results: Results
    predictions: Predictions
    classes: Sequence[str]
    names: Sequence[str]

    @cached_property
    def confusion(self) -> Confusion | None:
        """Labels and answers; None if images have several labels."""
        several = self.predictions.labels.shape[1] > 1
        return None if several else metrics.confusion(self.predictions)

    @cached_property
    def class_accuracy(self) -> metrics.ClassAccuracy:
        return metrics.class_accuracy(self.predictions, len(self.classes))

    @cached_property
    def hard(self) -> dict[str, NDArray[np.int64]]:
        """Indices of hard images, by kind."""
        return {
            "wrong_at_every_size": metrics.wrong_at_every_size(self.predictions),
            "right_only_when_small": metrics.right_only_when_small(self.predictions),
        }

    def rows(self) -> list[list[Any]]:
        """Return a row of `COLUMNS` per size, the largest first, and the ensemble's."""
        return [
            [name, r["top1"], r["top5"], r.get("loss"), r["ece"]]
            for name, r in self.results.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the single answers, as JSON takes it."""
        paths = self.predictions.paths
        return {
            **self.source,
            "images": len(paths),
            "results": self.results,
            "per_class": [
                {"class": self.classes[i], "name": self.names[i], "images": images, "top1": top1}
                for i, images, top1 in self._class_rows()
            ],
            "most_confused": self._most_confused(),
            **{what: [paths[i] for i in images] for what, images in self.hard.items()},
        }

    def tables(self) -> str:
        """Return the results, the classes that are hardest, and the most frequent confusions, as text."""
        head = ["size", "top-1 %", "top-5 %", "loss", "ECE %"]
        body = [
            [
                name,
                f"{top1:.2f}",
                f"{top5:.2f}",
                "" if loss is None else f"{loss:.4f}",
                f"{ece:.2f}",
            ]
            for name, top1, top5, loss, ece in self.rows()
        ]
        parts = [text_table(head, body), self._hardest_classes()]
        if self.confusion and len(self.confusion.wrong):
            parts.append(self._confusion_table())
        everywhere, small = map(len, self.hard.values())
        parts.append(
            f"of {len(self.predictions.paths)} images, {everywhere} are wrong at every size, and {small} are "
            f"wrong at {self.predictions.names[0]} and right at a smaller size"
        )
        return "\n\n".join(parts)

    def write(self, folder: Path) -> Path | None:
        """Write evaluation.json, tables and, but for several labels, confusion.png into a new folder.

        Returns the path of the plot, if there is one. Raises OSError.
        """
        with atomic_directory(folder) as new:
            atomic_write_json(new / "evaluation.json", self.to_dict())
            _write_csv(new / "per_class.csv", self._class_lines())
            for what, images in self.hard.items():
                _write_csv(new / f"{what}.csv", self._image_lines(images))
            if self.confusion is None:
                return None
            _write_csv(new / "confusion.csv", self._confusion_lines(self.confusion))
            title = f"{self.source['network']}, {self.predictions.names[0]} pixels"
            plot(new / "confusion.png", title, self.confusion, self.predictions.names, self.names)
        return folder / "confusion.png"

    def _class_rows(self) -> Iterator[tuple[int, int, dict[str, float]]]:
        """Yield output, images and top-1 of each result, of the classes that have images."""
        found = self.class_accuracy
        for output in np.flatnonzero(found.images):
            top1 = dict(zip(self.predictions.names, found.top1[output].tolist(), strict=True))
            yield int(output), int(found.images[output]), top1

    def _hardest_classes(self) -> str:
        largest, names = self.predictions.names[0], self.predictions.names
        rows = sorted(self._class_rows(), key=lambda row: row[2][largest])[:SHOWN]
        return text_table(
            [f"hardest classes at {largest}", "images", *(f"{name} %" for name in names)],
            [
                [self.names[i], str(images), *(f"{top1[name]:.1f}" for name in names)]
                for i, images, top1 in rows
            ],
            left=(0,),
        )

    def _confusion_table(self) -> str:
        names = self.predictions.names
        return text_table(
            [f"most confused at {names[0]}", "taken for", "images", *names],
            [
                [c["label_name"], c["answer_name"], str(c["images"]), *map(str, c["counts"].values())]
                for c in self._most_confused()[:SHOWN]
            ],
            left=(0, 1),
        )  # fmt: skip

    def _most_confused(self) -> list[dict[str, Any]]:
        """Return the most frequent confusions at the largest size; "images": those of the label."""
        found = self.confusion
        if found is None:
            return []
        return [
            {
                "label": self.classes[found.labels[pair]],
                "answer": self.classes[found.answers[pair]],
                "label_name": self.names[found.labels[pair]],
                "answer_name": self.names[found.answers[pair]],
                "images": int(found.images[pair]),
                "counts": dict(
                    zip(self.predictions.names, found.counts[pair].tolist(), strict=True)
                ),
            }
            for pair in found.wrong[:LISTED]
        ]

    def _class_lines(self) -> Iterator[Sequence[Any]]:
        yield ["output", "class", "name", "images", *(f"top1@{n}" for n in self.predictions.names)]
        for output, images, top1 in self._class_rows():
            yield [output, self.classes[output], self.names[output], images, *top1.values()]

    def _confusion_lines(self, found: Confusion) -> Iterator[Sequence[Any]]:
        yield ["label", "answer", "label_name", "answer_name", "images", *self.predictions.names]
        for label, answer, images, counts in zip(
            found.labels, found.answers, found.images, found.counts.tolist(), strict=True
        ):
            of_both = (names[i] for names in (self.classes, self.names) for i in (label, answer))
            yield [*of_both, images, *counts]

    def _image_lines(self, images: NDArray[np.int64]) -> Iterator[Sequence[Any]]:
        p = self.predictions
        yield ["path", "label", *(f"answer@{name}" for name in p.names)]
        for i in images:
            labels = "; ".join(self.names[label] for label in p.labels[i] if label >= 0)
            yield [p.paths[i], labels, *(self.names[answer] for answer in p.classes[i, :, 0])]


def evaluate_in_detail(
    model: ResolutionSwitchable,
    network: ModelConfig,
    loaders: Loaders,
    device: torch.device,
    amp: torch.dtype | None,
    *,
    source: Mapping[str, Any],
    real: Path | None = None,
    names: Callable[[Sequence[str]], Sequence[str]] = lambda classes: classes,
    keep_logits: bool = False,
    say: Callable[[str], None] = lambda _: None,
    on_images: Callable[[int], None] = lambda _: None,
) -> DetailedEvaluation | None:
    """Evaluate on `loaders.val`, all ranks together; return the evaluation on rank 0, None on others.

    network: the description of `model`. real: a file of ImageNet-ReaL's labels, which are then those of the
    images. names: gives the readable names of the outputs by their classes'. say: is told how the labels are
    understood. on_images: is told how many images this rank has done. source: see `DetailedEvaluation`.

    Raises UsageError if the labels are not those of the network, RunError if outputs are not finite.
    """
    match = match_classes if real is None else any_labels
    labels = match(loaders.classes, network.classes, network.num_classes)
    how, of_real = labels.how, None
    if real is not None:
        paths = loaders.val.sample_names
        of_real = real_labels(paths, read_real(real), labels.classes, network.num_classes)
        labelled = int((of_real >= 0).any(axis=1).sum())
        how = f"{real} has labels of {labelled} of the {len(paths)} images"
    if how:
        say(f"labels: {how}")
    classes = [*labels.classes, *map(str, range(len(labels.classes), network.num_classes))]
    readable = names(labels.classes)
    found, results = predict(
        model, loaders.val, labels, device, amp, keep_logits=keep_logits, on_images=on_images
    )
    if found is None:
        return None
    if of_real is not None:
        found = found.with_labels(of_real)
        results = metrics.accuracies(found)
    errors = metrics.calibration_errors(found)
    merged = {name: {**result, "ece": errors[name]} for name, result in results.items()}
    about = {**source, "network": network.arch, "labels": how}
    return DetailedEvaluation(about, merged, found, classes, readable)


def _write_csv(path: Path, lines: Iterable[Sequence[Any]]) -> None:
    # A path's bytes that are no text stay what they are.
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows(lines)

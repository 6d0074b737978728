"""Releases of runs, checkpoints and files of the original code, written to a folder or kept in memory.

Apart from `package`, as reading a release needs none of what reads checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.utils.atomic_io import atomic_write
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.evaluation.class_names import readable_names
from rsnet.models.shapes import model_cost
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.release import package
from rsnet.release.config import result_names
from rsnet.release.source import BEST, SavedNetwork, open_source

Accuracy = dict[str, dict[str, float]]


def release_run(
    run: str | Path,
    output: str | Path,
    say: Callable[[str], None] = lambda _: None,
    class_names: Path | None = None,
) -> package.Release:
    """Write the release `output` of what `open_source` takes, and return its content.

    The averaged weights are released where there are some. config.json has their accuracies if they are of
    a run directory whose metrics.jsonl has an evaluation of just these weights. A release is copied.
    say: is told what was taken. class_names: a file with readable names of the classes, see
    `rsnet.evaluation.class_names`; without it ImageNet's WordNet ids have theirs.

    Raises what `open_source` does, and UsageError if there is something at `output`.
    """
    source = open_source(run)
    if source.release is not None:
        names = _class_names(source.network, class_names) if class_names else ()
        written = package.copy(source.release, output, names)
    else:
        model = source.build()
        network = source.network.to_dict()
        written = package.write(output, network, model, **_facts(source, model, class_names))
        if source.run_dir is not None and source.kind == "run":
            _take_tuned_along(source.run_dir, written)
    for line in source.lines():
        say(line)
    return written


def _take_tuned_along(run_dir: Path, written: package.Release) -> None:
    """Copy the run's tuned.json into its release, if it is of these weights."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or damaged
        data = (run_dir / package.TUNED).read_bytes()
        if json.loads(data)["sha256"] == written.config["weights"]["sha256"]:
            atomic_write(written.folder / package.TUNED, data)


def released(source: SavedNetwork) -> package.Release:
    """Return the release of what was opened, as `release_run` would write it.

    What is found out about the weights of a run is kept in its directory, as of a release in its folder;
    about those of any other file beside it, under its name.
    """
    if source.release is not None:
        return source.release
    model = source.build()
    run_dir = source.run_dir if source.file.name == BEST or source.kind == "run" else None
    folder, prefix = (run_dir, "") if run_dir else (source.file.parent, f"{source.file.name}-")
    network = source.network.to_dict()
    return package.in_memory(network, model, folder, prefix, **_facts(source, model))


def _facts(
    source: SavedNetwork, model: ResolutionSwitchable, class_names: Path | None = None
) -> dict[str, Any]:
    """Return what `package.write` is told of a network."""
    run_dir = source.run_dir
    return {
        "gmacs": model_cost(model),
        "accuracy": _accuracy(run_dir, source.checkpoint, source.file.name == BEST)
        if run_dir
        else None,
        "averaged": source.checkpoint.ema is not None,
        "source": {
            "run": run_dir.name if run_dir else None,
            "checkpoint": source.file.name,
            "epoch": source.checkpoint.epoch,
        },
        "class_names": _class_names(source.network, class_names),
    }


def _class_names(network: ModelConfig, file: Path | None) -> tuple[str, ...]:
    """Return the readable names of all outputs; none if they are the network's own."""
    own = [*network.classes, *map(str, range(len(network.classes), network.num_classes))]
    names = readable_names(network.classes, network.num_classes, file)
    return () if list(names) == own else names


def _accuracy(run_dir: Path, checkpoint: Checkpoint, is_best: bool) -> Accuracy | None:
    """Return the run's evaluation of just these weights; None if there is none.

    is_best: whether they are of best.pt, which notes its own score. Of an epoch that was trained again, from
    a checkpoint before it, there are two evaluations: what came first was set aside.
    """
    score = checkpoint.score if is_best else []
    if checkpoint.done:
        return None
    for name in ("metrics.jsonl", "metrics.abandoned.jsonl")[: 2 if score else 1]:
        file = run_dir / name
        for line in reversed(file.read_bytes().splitlines() if file.is_file() else []):
            found = _evaluation_in(line, checkpoint)
            if found and (
                not score or found[str(max(checkpoint.network.sizes))]["top1"] == score[0]
            ):
                return found
    return None


def _evaluation_in(line: bytes, checkpoint: Checkpoint) -> Accuracy | None:
    """Return the accuracies in a line of metrics, if it is of an evaluation after the checkpoint's epoch."""
    try:
        logged = json.loads(line)
        if logged["epoch"] != checkpoint.epoch:
            return None
        return {
            name: {what: logged[f"val/{what}@{name}"] for what in ("top1", "top5")}
            for name in result_names(checkpoint.network.to_dict())
        }
    except (
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # cut short by a crash, or another line
        return None

"""`rsnet add-resolution`: give a trained network a resolution that it was not trained for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from pipelines.sources.options import SplitOptions
from pipelines.utils.errors import UsageError, error_context
from pipelines.utils.location import url_of
from pipelines.utils.output import say
from pipelines.utils.tables import text_table
from rsnet.cli.classifier import SOURCE, say_source
from rsnet.cli.output import require_new
from rsnet.config.bounds import MANY, MAX_IMAGES, MAX_LR, MAX_PIXELS

if TYPE_CHECKING:
    import torch

    from rsnet.config.model_config import ModelConfig
    from rsnet.release.source import SavedNetwork
    from rsnet.training.add_resolution import State


@dataclass(frozen=True)
class Options:
    """Add a resolution to a trained network; the other sizes' outputs stay as they are, bit for bit."""

    # By their names in version 0.1: what they are called now, "" for an argument without a name.
    FORMER: ClassVar = {"--checkpoint": ""}

    source: Positional[Annotated[str, arg(metavar=SOURCE)]]
    """Run directory, checkpoint, release, or file of the original code."""

    size: int
    """The new resolution, in pixels."""

    data: Annotated[str, arg(aliases=("-d",), metavar="DIR")]
    """Images as in training: a folder with train/ and val/, or with train.beton and val.beton, a table of
    paths, or tar shards."""

    val_data: Annotated[str | None, arg(metavar="DIR")] = None
    """Validation images of their own, as in training."""

    val_fraction: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Share of the images for validation, as in training, where there are no others."""

    how: Annotated[Literal["interpolate", "estimate", "distil"], arg(aliases=("--method",))] = (
        "distil"
    )
    """BatchNorm to save: interpolated from the neighbouring sizes; the same with statistics estimated from
    training images; or the same trained to give the ensemble's outputs."""

    output: Annotated[Path | None, arg(metavar="FILE.pt")] = None
    """Checkpoint to write. Unset: beside what was given, under its name and the size; needed for a URL."""

    steps: int = 200
    """Batches of training images, for estimate and for distil; at most one epoch."""

    batch_size: Annotated[int, arg(aliases=("-b",))] = 64
    """Images per batch."""

    lr: float = 0.01
    """Learning rate of distil."""

    seed: int = 0
    """Seed of order and crops."""

    def __post_init__(self) -> None:
        for flag, value, least, most in (
            ("size", self.size, 1, MAX_PIXELS), ("steps", self.steps, 1, MANY),
            ("batch-size", self.batch_size, 2, MAX_IMAGES), ("seed", self.seed, 0, 2**63 - 1),
        ):  # fmt: skip
            if not least <= value <= most:
                raise UsageError(f"--{flag} {value}: at least {least}, and {most} at most")
        SplitOptions(self.val_data, self.val_fraction)  # checks them
        if not 0 < self.lr <= MAX_LR:
            raise UsageError(f"--lr {self.lr}: must be a positive number, {MAX_LR:g} at most")


def run(options: Options) -> int:
    from rsnet.checkpoint import io
    from rsnet.checkpoint.checkpoint import Checkpoint
    from rsnet.distributed import process_group
    from rsnet.release.source import open_source

    if options.output is None and url_of(options.source):
        raise UsageError(f"--output: name a file, as {options.source} is not on this machine")
    source = open_source(options.source)
    network, file = source.network, source.file.resolve()
    output = options.output or file.with_name(f"{file.stem}-{options.size}.pt")
    _require_addable(options, source, output)
    states, results = _compute(options, source, process_group.setup("auto"))
    rows = [
        [name, *(f"{r[key]:.{digits}f}" for key, digits in (("top1", 2), ("top5", 2), ("loss", 4))),
         "saved" if name == options.how else ""]
        for name, r in results.items()
    ]  # fmt: skip
    head = [f"size {options.size}", "top-1 %", "top-5 %", "loss", ""]
    print(text_table(head, rows, left=(0, 4)))
    sizes = sorted([*network.sizes, options.size], reverse=True)
    calibrated = {**network.calibrated, str(options.size): options.how}
    described = dataclasses.replace(network, sizes=tuple(sizes), calibrated=calibrated)
    # For a resolution that is added to this one, and of what it was trained on, for an evaluation.
    known = source.checkpoint.config
    kept = {"loss"} if source.checkpoint.loss != "ce" else set()
    if known.get("val_fraction") is not None:
        kept |= {"data", "val_fraction"}
    config = {name: known[name] for name in kept}
    io.save(output, Checkpoint(described, states[options.how], config=config))
    say(f"{output}: sizes {' '.join(map(str, sizes))}")
    return 0


def _compute(
    options: Options, source: SavedNetwork, device: torch.device
) -> tuple[dict[str, State], dict[str, dict[str, float]]]:
    """Return the network's state by each method, and its evaluation at the new size."""
    from pipelines.batch import LoaderSpec
    from rsnet.cli.loaders import make_loaders, say_if_trained_on
    from rsnet.evaluation.evaluate import evaluate
    from rsnet.models.state_dict import select_sizes
    from rsnet.training.add_resolution import build_network, candidates

    network = source.network
    sizes = sorted([*network.sizes, options.size], reverse=True)
    spec = LoaderSpec(
        options.data, tuple(sizes), options.batch_size, device,
        normalize=network.normalize, seed=options.seed,
        splits=SplitOptions(options.val_data, options.val_fraction),
    )  # fmt: skip
    with error_context(f"--size {options.size}"):
        build_network(network, sizes, device)
    say_source(source)
    say_if_trained_on(source.checkpoint.config, options.data, options.val_fraction)
    results = {}
    with ExitStack() as stack:
        loaders = make_loaders(spec, True)
        assert loaders.train is not None
        stack.enter_context(closing(loaders.train))
        stack.enter_context(closing(loaders.val))
        _require_classes(options, network, loaders.classes)
        val = make_loaders(dataclasses.replace(spec, sizes=(options.size,)), False).val
        stack.enter_context(closing(val))
        states = candidates(
            source.checkpoint, options.size, loaders.train, device, options.steps, options.lr
        )
        for name, state in states.items():
            single = build_network(network, [options.size], device)
            single.load_state_dict(select_sizes(state, sizes, [options.size]))
            results[name] = evaluate(single, val, device)[str(options.size)]
    return states, results


def _require_addable(options: Options, source: SavedNetwork, output: Path) -> None:
    """Raise UsageError if the size cannot be added, or the file not be written."""
    from rsnet.config.model_config import FULL

    network = source.network
    if options.size in network.sizes:
        raise UsageError(f"--size {options.size}: {source.path} has it already")
    if network.norm == "shared":
        raise UsageError(f"{source.path}: one BatchNorm serves all sizes; there is none to add")
    if source.release is not None and network.qw != FULL:
        raise UsageError(
            f"{source.path}: a release has the values of its {network.qw}-bit weights alone; give its run "
            "or checkpoint"
        )
    require_new("--output", output)


def _require_classes(options: Options, network: ModelConfig, classes: Sequence[str]) -> None:
    """Raise UsageError if the data has other classes; a checkpoint of the original code names none."""
    if (list(network.classes) or classes) != classes or len(classes) > network.num_classes:
        raise UsageError(f"--data {options.data} has other classes than the checkpoint")

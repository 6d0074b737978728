"""Starting from trained weights: which file they are in, what is taken from them, and what stays frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pipelines.utils.errors import DataError, UsageError, error_context
from rsnet.checkpoint import tf_checkpoint
from rsnet.checkpoint.authors_pytorch import is_original
from rsnet.checkpoint.checkpoint import FORMAT, Checkpoint
from rsnet.checkpoint.weights import load_weights, require_match
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import classifier_names
from rsnet.models.pretrained import is_path
from rsnet.models.quantization.lq_nets import full_precision_names, init_quantizers_from_weights
from rsnet.models.safe_load import safe_load
from rsnet.models.state_dict import take_sizes
from rsnet.models.switchable import ResolutionSwitchable, SwitchableBatchNorm2d
from rsnet.release.source import open_source, release_folder

BACKBONE = "backbone"  # of --freeze: all but the classifier and BatchNorm
NOTHING = "none"


def read_switchable(
    pretrained: str,
    arch: str | None,
    sizes: Sequence[int] | None,
    say: Callable[[str], None] = lambda _: None,
) -> Checkpoint | None:
    """Return the RS-Net that --pretrained names: a run directory, a checkpoint, a release, or a file of the
    original code. None for weights of an ordinary network, see `rsnet.models.pretrained`.

    arch, sizes: what an original's file may not say of its network. say: is told what was taken.

    Raises UsageError for a folder that holds none, DataError for a file that is damaged.
    """
    path = Path(pretrained)
    is_there = path.exists() or tf_checkpoint.is_tf_checkpoint(path)
    if pretrained == "default" or not (is_there or is_path(pretrained)):
        return None
    with error_context("--pretrained"):
        if path.is_file() and not holds_switchable(path):
            return None
        try:
            source = open_source(path, arch, sizes)
        except UsageError:  # an original's file of other sizes than these
            source = open_source(path, arch)
    say(f"--pretrained: {source.lines()[0]}")
    return source.checkpoint


def start_from(
    model: ResolutionSwitchable, wanted: ModelConfig, checkpoint: Checkpoint, source: str
) -> list[str]:
    """Give `model`, described by `wanted`, the weights of an RS-Net in full precision, or their averages.

    A size that it was not trained for gets the BatchNorm of the nearest one; the classifier starts anew if
    the classes are others. Both are said in the lines that are returned.

    Raises UsageError if that is not of the same network, or quantized itself; DataError if it is damaged.
    """
    trained = checkpoint.network
    notes = []
    with error_context(f"--pretrained: {source} does not fit"):
        if trained.is_quantized:
            raise UsageError("it is quantized itself; --resume goes on with it")
        alike = dataclasses.replace(
            trained, qw=wanted.qw, qa=wanted.qa, num_classes=wanted.num_classes,
            sizes=wanted.sizes, classes=wanted.classes,
        )  # fmt: skip
        require_match(alike, wanted, training=False)
        if trained.normalize != wanted.normalize:
            raise UsageError(
                f"--normalize is {trained.normalize} there and {wanted.normalize} here"
            )
        state, sources = take_sizes(
            checkpoint.eval_weights, trained.sizes, wanted.sizes, model.shared_norm
        )
        names = full_precision_names(model)
        weights = {names.get(k, k): v for k, v in state.items()}
        own = model.state_dict()
        if why := _other_classes(trained, wanted):
            fresh = (f"network.{name}" for name in classifier_names(wanted))
            weights |= {k: own[k] for k in (names.get(name, name) for name in fresh)}
            notes.append(f"the classifier starts anew: {why}")
        elif not trained.classes:
            notes.append(
                "it does not name its classes: they are taken to be --data's, in their order"
            )
        quantizers = {k: v for k, v in own.items() if k not in names.values()}
        load_weights(model, {**quantizers, **weights}, wanted.sizes)
    model.complete_alpha()
    init_quantizers_from_weights(model)
    others = ", ".join(f"{size} from {s}'s" for size, s in sources.items() if size != s)
    if others and not model.shared_norm:
        notes.append(f"BatchNorm of sizes that it was not trained for: {others}")
    return [f"--pretrained: {source}: {note}" for note in notes]


def freeze(model: ResolutionSwitchable, what: str, config: ModelConfig) -> None:
    """Freeze shared weights of `model`, which `config` describes; BatchNorm is always trained. what:
    BACKBONE for all but the classifier, NOTHING, or the name of the last layer to freeze.

    Raises UsageError for a layer that is not there.
    """
    if what == NOTHING:
        return
    norms = [m for m in model.network.modules() if isinstance(m, SwitchableBatchNorm2d)]
    learns = {id(p) for norm in norms for p in norm.parameters()}
    shared = [(n, p) for n, p in model.network.named_parameters() if id(p) not in learns]
    if what == BACKBONE:
        head = classifier_names(config)
        frozen = [p for name, p in shared if name not in head]
    else:
        frozen = _up_to(shared, what)
    for parameter in frozen:
        parameter.requires_grad_(False)


def _up_to(shared: Sequence[tuple[str, nn.Parameter]], layer: str) -> list[nn.Parameter]:
    within = [i for i, (name, _) in enumerate(shared) if name.startswith(f"{layer}.")]
    if not within:
        known = " ".join(dict.fromkeys(name.split(".")[0] for name, _ in shared))
        raise UsageError(
            f"--freeze {layer}: there is no such layer with shared weights; there are {known}, and what is "
            "in them"
        )
    return [p for _, p in shared[: within[-1] + 1]]


def _other_classes(trained: ModelConfig, wanted: ModelConfig) -> str:
    if trained.num_classes != wanted.num_classes:
        return f"{trained.num_classes} classes there, {wanted.num_classes} here"
    # The original's files do not name their classes.
    if trained.classes and trained.classes != wanted.classes:
        return "the classes have other names"
    return ""


def holds_switchable(path: Path) -> bool:
    """Return whether a file holds an RS-Net: a checkpoint, a release's weights, or the original code's."""
    if release_folder(path) or tf_checkpoint.is_tf_checkpoint(path):
        return True
    if path.suffix == ".safetensors":
        return False
    try:
        content: Any = safe_load(path)
    except DataError:
        return False
    return is_original(content) or (
        isinstance(content, dict) and content.get("format") == FORMAT and "network" in content
    )

"""The original implementation's checkpoint files: read into ours, and written from ours.

Their names: `conv1.module.weight` for a shared layer, `bn1.bn_0.weight` for the BatchNorm of the first
entry of --sizes, `alpha`; all with `module.` in front where DataParallel trained them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.utils.errors import DataError, UsageError
from rsnet.checkpoint.authors_optimizer import from_original_optimizer, to_original_optimizer
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.bounds import MAX_PIXELS
from rsnet.config.model_config import (
    DEFAULT_SIZES,
    MODEL_DEFAULTS,
    WEIGHT_FIELDS,
    ModelConfig,
    canonical_arch,
)
from rsnet.models.factory import create_model
from rsnet.models.state_dict import describe_mismatch

# What the original has; its other names build the same networks.
ARCHS = (
    *(f"parallel_resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    "parallel_resnext50_32x4d",
    "parallel_resnext101_32x8d",
    "parallel_mobilenetv2",
)

# How far below the largest alpha float32's softmax gives 0.
NO_SHARE = 104.0


def is_original(content: Any) -> bool:
    """Return whether a loaded file is the original's: a state dict with its names, or a dict around one."""
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    return isinstance(state, dict) and any(
        isinstance(key, str) and re.search(r"\.bn_\d+\.weight$", key) for key in state
    )


def _copies(state: Mapping[str, Tensor]) -> int:
    """Return how many sizes have BatchNorm of their own. Raises DataError if there is none."""
    found = (re.search(r"\.bn_(\d+)\.", key) for key in state)
    copies = 1 + max((int(m[1]) for m in found if m), default=-1)
    if copies == 0:
        raise DataError("it has no BatchNorm weights that are tensors")
    return copies


def _valid(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return --sizes. Raises UsageError for what no network may have."""
    if not (min(sizes) >= 1 and max(sizes) <= MAX_PIXELS and len({*sizes}) == len(sizes)):
        raise UsageError(
            f"--sizes {' '.join(map(str, sizes))}: they are to be all different, and of {MAX_PIXELS} pixels "
            "at most"
        )
    return tuple(sizes)


def from_original(
    content: Mapping[str, Any], arch: str | None = None, sizes: Sequence[int] | None = None
) -> Checkpoint:
    """Return a checkpoint of ours, made of the content of an original's.

    sizes: as they were given to the original, in that order, which its file does not tell; None for
    224 192 160 128 96. arch: None for what the file says.

    Raises UsageError if arch or sizes are needed or wrong, DataError with the names and shapes of what
    does not fit.
    """
    state = _state(content)
    arch = arch or content.get("arch")
    if arch is None:
        raise UsageError(
            "--arch: this file does not say which network it holds; give it, or make a run of the file by "
            f"`rsnet import FILE --arch NAME`, one of {_known()}"
        )
    arch = canonical_arch(str(arch))
    if arch not in ARCHS:
        raise UsageError(f"--arch {arch}: the original has no such network; one of {_known()}")
    copies = _copies(state)
    sizes = _valid(sizes or DEFAULT_SIZES)
    if len(sizes) != copies:
        raise UsageError(
            f"--sizes: this file was trained for {copies} sizes, not for {' '.join(map(str, sizes))}; make a "
            "run of it by `rsnet import FILE --sizes SIZES --output DIR`, with the sizes in the order in "
            "which they were given to the original"
        )
    classifier = state.get(
        "classifier.module.weight" if "mobilenet" in arch else "fc.module.weight"
    )
    if classifier is None or classifier.ndim != 2:
        raise DataError(f"there is no classifier of {arch} in this file; is --arch right?")
    names = _names(arch, len(classifier), sizes)
    shapes = {theirs: shape for theirs, (_, shape) in names.items()}
    if problems := describe_mismatch(shapes, state):
        raise DataError(f"the weights do not fit {arch}: {problems}")
    model = {ours: state[theirs] for theirs, (ours, _) in names.items() if theirs in state}
    for theirs, (ours, shape) in names.items():
        if theirs not in state:  # PyTorch before 0.4.1 did not count batches
            model[ours] = torch.zeros(shape, dtype=torch.int64)
    model["alpha"] = model["alpha"][_order(sizes)]
    config = ModelConfig(arch, len(classifier), sizes, normalize="unit")
    optimizer = from_original_optimizer(content.get("optimizer"), names, _order(sizes))
    return Checkpoint(config, model, epoch=_epoch(content), optimizer=optimizer, of_authors=True)


def assumed_sizes(source: object, network: ModelConfig, is_start: bool = False) -> str:
    """Return a line that says which sizes `from_original` assumed.

    is_start: whether --sizes are those of a training that starts from the file, and not the file's.
    """
    sizes = " ".join(map(str, network.sizes))
    how = "first make a run of it by rsnet import with its" if is_start else "give"
    return (
        f"note: {source} does not say its sizes; {sizes} is assumed: if it was trained for others, {how} "
        "--sizes, in the order in which the original was given them"
    )


def to_original(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of an original's file; its --sizes have to be given the largest first.

    Raises UsageError for a network that the original does not have.
    """
    config = checkpoint.network
    changed = [
        name
        for name in WEIGHT_FIELDS
        if name in MODEL_DEFAULTS and getattr(config, name) != MODEL_DEFAULTS[name]
    ]
    if config.arch not in ARCHS or changed:
        what = " with ".join([config.arch, *changed])
        raise UsageError(f"the original has no {what}; its networks are {_known()}")
    names = _names(config.arch, config.num_classes, config.sizes)
    weights = dict(checkpoint.eval_weights)
    # A size that was added has alpha -inf, of which the original's weight decay makes NaN.
    weights["alpha"] = torch.maximum(weights["alpha"], weights["alpha"].max() - NO_SHARE)
    state = {f"module.{theirs}": weights[ours] for theirs, (ours, _) in names.items()}
    return {
        "epoch": checkpoint.epoch,
        "arch": config.arch,
        "state_dict": state,
        "optimizer": to_original_optimizer(checkpoint, names),
        # Not measured as ours.
        "best_acc0": 0.0,
        "best_acc": 0.0,
    }


def _state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights, without DataParallel's `module.`; what else lies among them is left out."""
    state: Mapping[Any, Any] = content.get("state_dict", content)
    return {
        k.removeprefix("module."): v
        for k, v in state.items()
        if isinstance(k, str) and isinstance(v, Tensor)
    }


def _epoch(content: Mapping[str, Any]) -> int:
    """Return the epochs that are done, as far as the file tells."""
    epoch = content.get("epoch")
    return epoch if isinstance(epoch, int) and epoch >= 0 else 0


def _order(sizes: Sequence[int]) -> list[int]:
    """Return the original's index of each of our sizes, the largest first."""
    return [list(sizes).index(s) for s in sorted(sizes, reverse=True)]


@functools.cache  # a quarter of a second
def _names(
    arch: str, num_classes: int, sizes: tuple[int, ...]
) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Return {the original's name: (ours, shape)} of everything in a network's state dict."""
    with torch.device("meta"):
        model = create_model(ModelConfig(arch, num_classes, sizes))
    theirs_of_ours = dict(enumerate(_order(sizes)))
    names = {}
    for ours, value in model.state_dict().items():
        name = ours.removeprefix("network.")
        layer, infix, rest = name.partition(".by_resolution.")
        if "mobilenet" in arch:
            layer = _mobilenet_layer(layer, is_norm=bool(infix))
        if infix:
            index, leaf = rest.split(".", 1)
            name = f"{layer}.bn_{theirs_of_ours[int(index)]}.{leaf}"
        elif name != "alpha":
            layer, _, leaf = layer.rpartition(".")
            name = f"{layer}.module.{leaf}"
        names[name] = (ours, tuple(value.shape))
    return names


def _mobilenet_layer(layer: str, is_norm: bool) -> str:
    """Return the layer's name before torchvision nested convolution, BatchNorm and activation in one module.

    `layer` ends with the leaf if it is no BatchNorm's.
    """
    layer = re.sub(r"^features\.18\.", "conv.", layer)
    layer = re.sub(r"^classifier\.1\b", "classifier", layer)
    nested = re.match(r"(features\.\d+\.conv)\.(\d+)\.(\d+)(.*)", layer)
    if nested:
        head, outer, inner, tail = nested.groups()
        return f"{head}.{3 * int(outer) + int(inner)}{tail}"
    flat = re.match(r"(features\.\d+\.conv)\.(\d+)(.*)", layer)
    if flat:  # the last convolution and its BatchNorm, which have no activation
        head, outer, tail = flat.groups()
        return f"{head}.{3 * (int(outer) - is_norm) + is_norm}{tail}"
    return layer


def _known() -> str:
    return " ".join(ARCHS)

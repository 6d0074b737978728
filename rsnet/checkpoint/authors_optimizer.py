"""The optimizer's state in the original implementation's files: momentum and weight decay."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.recipes import get_recipe

# {the original's name: (ours, shape)}, see `rsnet.checkpoint.authors_pytorch`.
Names = Mapping[str, tuple[str, tuple[int, ...]]]


def to_original_optimizer(checkpoint: Checkpoint, names: Names) -> dict[str, Any]:
    """Return the state dict of the original's SGD: one group, with the weights' momentum if there is any.

    Averaged weights have none. Weight decay that is not known is the paper's: the original goes on with
    what is written here, whatever its options are.
    """
    config = checkpoint.config
    parameters = _in_their_order(names)
    paper = get_recipe("paper", checkpoint.network.arch, None, 256)
    decay = weight_decay(checkpoint)
    group = {
        "params": list(range(len(parameters))),
        "lr": config.get("lr", 0.0),
        "momentum": config.get("momentum", 0.9),
        "dampening": 0,
        "weight_decay": config.get("weight_decay", paper.weight_decay) if decay is None else decay,
        "nesterov": config.get("opt") == "nesterov",
    }
    saved = checkpoint.optimizer if checkpoint.ema is None else None
    found = saved["state"] if saved is not None else {}
    buffers = {
        name: found.get(i, {}).get("momentum_buffer") for i, name in enumerate(_in_our_order(names))
    }
    shapes = dict(names.values())
    has_all = all(_fits(buffers[name], shapes[name]) for name in parameters)
    state = (
        {i: {"momentum_buffer": buffers[n]} for i, n in enumerate(parameters)} if has_all else {}
    )
    return {"state": state, "param_groups": [group]}


def from_original_optimizer(
    content: Any, names: Names, alpha_order: Sequence[int]
) -> dict[str, Any] | None:
    """Return the state dict of our optimizer, with the momentum and the weight decay of the original's; None
    if that has no momentum of all weights.

    alpha_order: the original's index of each of our sizes.
    """
    groups = content.get("param_groups") if isinstance(content, Mapping) else None
    if not isinstance(groups, list) or not all(isinstance(g, Mapping) for g in groups):
        return None
    parameters = _in_their_order(names)
    # Before PyTorch 1.5 these were no indices, but numbers of the process that wrote them.
    keys = [key for group in groups for key in group.get("params", ())]
    state = content.get("state")
    if len(keys) != len(parameters) or not isinstance(state, Mapping):
        return None
    shapes = dict(names.values())
    buffers: dict[str, Any] = {}
    for name, key in zip(parameters, keys, strict=True):
        of_one = state.get(key)
        buffer: Any = of_one.get("momentum_buffer") if isinstance(of_one, Mapping) else None
        if not _fits(buffer, shapes[name]):
            return None
        buffers[name] = buffer[list(alpha_order)] if name == "alpha" else buffer
    order = _in_our_order(names)
    filters = sum(len(shapes[name]) > 1 for name in order)
    decay = _decay_of(groups[0])
    return {
        "state": {i: {"momentum_buffer": buffers[name]} for i, name in enumerate(order)},
        "param_groups": [
            {"params": list(indices), "weight_decay": decay}
            for indices in (range(filters), range(filters, len(order)))
        ],
    }


def weight_decay(checkpoint: Checkpoint) -> float | None:
    """Return the weight decay of a file that was imported; None if it is not known."""
    if checkpoint.config or checkpoint.optimizer is None:
        return None
    groups = checkpoint.optimizer["param_groups"]
    return _decay_of(groups[0]) if groups else None


def _decay_of(group: Mapping[str, Any]) -> float | None:
    decay = group.get("weight_decay")
    return decay if isinstance(decay, float) and 0 <= decay < 1 else None


def _fits(buffer: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(buffer, Tensor) and tuple(buffer.shape) == shape


def _parameters(names: Names) -> list[tuple[str, str, tuple[int, ...]]]:
    return [
        (theirs, ours, shape)
        for theirs, (ours, shape) in names.items()
        if ours == "alpha" or ours.endswith((".weight", ".bias"))
    ]


def _in_their_order(names: Names) -> list[str]:
    """Return our names in the order of the original's parameters, whose bn_0 comes before bn_1."""
    first: dict[str, int] = {}
    placed = []
    for n, (theirs, ours, _) in enumerate(_parameters(names)):
        norm = re.match(r"(.*)\.bn_(\d+)\.", theirs)
        layer, copy = (norm[1], int(norm[2])) if norm else (theirs, 0)
        placed.append((first.setdefault(layer, n), copy, n, ours))
    return [ours for *_, ours in sorted(placed)]


def _in_our_order(names: Names) -> list[str]:
    """Return our names in the order of `rsnet.training.optim.make_sgd`, by their dimensions."""
    parameters = _parameters(names)
    return [o for _, o, shape in parameters if len(shape) > 1] + [
        o for _, o, shape in parameters if len(shape) <= 1
    ]

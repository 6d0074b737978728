"""`Checkpoint`: the content of a checkpoint file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipelines.utils.errors import DataError
from pipelines.utils.schema import (
    NOTHING,
    OBJECT,
    TEXT,
    Rule,
    dict_of,
    integer,
    list_of,
    require_fields,
)
from rsnet.config.model_config import ModelConfig
from rsnet.config.model_rules import require_network
from rsnet.config.recipes import by_new_names
from rsnet.losses import LossName

FORMAT = 1

State = Mapping[str, Tensor]

# What makes a checkpoint the best: top-1 at the largest size, then the mean of all sizes' top-1 and top-5.
BEST_BY = "top1"

# Fields that the file leaves out if they are None.
_OPTIONAL = ("best_by", "ema", "optimizer", "scaler", "guard", "ranks")


def _is_plain(value: Any) -> bool:
    """Return whether a value is a dense tensor on the CPU that is not expanded beyond its storage."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _fields(rules: Mapping[str, Rule]) -> Rule:
    """Return a rule for a dict with fields of its own."""
    what = f"an object with {', '.join(rules)}"
    return Rule(
        what,
        lambda v: isinstance(v, dict) and all(k in v and rules[k].holds(v[k]) for k in rules),
    )


_TENSOR = Rule("a tensor", _is_plain)
_STATE = dict_of("tensors by name", _TENSOR)
_FINITE = Rule("a finite number", lambda v: type(v) in (int, float) and math.isfinite(v))
_MEANS = Rule(
    "names and a tensor of two rows",
    lambda v: len(v) == 2 and _TENSOR.holds(v[1]) and v[1].shape == (2, len(v[0])),
)
_LOADER = _fields(
    {
        **dict.fromkeys(("epoch", "position", "samples"), integer(0)),
        "seed": integer(-(2**63), 2**64),
        **dict.fromkeys(("data", "order"), TEXT),
    }
)
_OPTIMIZER = _fields(
    {
        "param_groups": list_of("", _fields({"params": list_of("", integer(0))})),
        "state": Rule("", lambda v: isinstance(v, dict) and all(map(OBJECT.holds, v.values()))),
    }
)
_RANK = _fields(
    {
        "buffers": list_of("tensors", _TENSOR),
        "means": list_of("means", _MEANS),
        "rng": _TENSOR,
        "cuda_rng": _TENSOR | NOTHING,
    }
)
_RULES = {
    "model": _STATE,
    "ema": _STATE | NOTHING,
    "config": OBJECT,
    "global_batch": integer(1) | NOTHING,
    **dict.fromkeys(("epoch", "done", "step"), integer(0)),
    "loader": _LOADER | NOTHING,
    "best": list_of("a list of finite numbers", _FINITE),
    **dict.fromkeys(("best_by", "wandb_id"), TEXT | NOTHING),
    "optimizer": _OPTIMIZER | NOTHING,
    "scaler": OBJECT | NOTHING,
    "guard": list_of("a list of integers", integer(0)) | NOTHING,
    "ranks": list_of("the state of each process", _RANK) | NOTHING,
}


@dataclass(frozen=True)
class Checkpoint:
    """A network, its weights and, of a training run, all that is needed to resume it.

    Files that hold weights only (imported, or with a resolution added) have the defaults in the other fields.
    """

    network: ModelConfig
    model: State
    """The network's state dict."""

    ema: State | None = None
    """State dict with the averaged weights, if there are any."""

    config: dict[str, Any] = field(default_factory=dict)
    """Options of the run."""

    global_batch: int | None = None
    """Images per update."""

    epoch: int = 0
    """Epochs that are finished."""

    done: int = 0
    """Updates of the epoch that is not finished."""

    step: int = 0
    """Updates in total."""

    loader: dict[str, Any] | None = None
    """The training loader's state dict."""

    best: list[float] = field(default_factory=list)
    """Score of best.pt; empty if there is none yet. In best.pt itself, of its weights."""

    best_by: str | None = None
    """How that score is computed; None: as the sum that version 0.1.0 compared."""

    wandb_id: str | None = None
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    guard: list[int] | None = None
    """State of `FiniteGuard`."""

    ranks: list[dict[str, Any]] | None = None
    """State of each process: random numbers, BatchNorm's statistics, running means."""

    of_authors: bool = False
    """Whether it was read from a file of the original code. Not kept in files."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Checkpoint:
        """Return the checkpoint that a file's content describes.

        Raises DataError if the content is not of such a file: each field is checked before it is used.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"network", "of_authors"}
        values = {name: value for name, value in content.items() if name in known}
        rules = {name: _RULES[name] for name in {"model": None, **values}}
        try:
            network = ModelConfig.from_dict(content["network"])
            require_network(network.to_dict(), "network.")
            require_fields(values, rules)
            values["config"] = by_new_names(values.get("config", {}))
            return cls(**values | {"network": network})
        except (LookupError, TypeError, AttributeError) as error:
            raise DataError(f"it does not describe a network with its weights ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["of_authors"]
        values = {k: v for k, v in values.items() if v is not None or k not in _OPTIONAL}
        return {"format": FORMAT, **values, "network": self.network.to_dict()}

    @property
    def score(self) -> list[float]:
        """`best`, if it can be compared with the scores of this version; else empty."""
        return self.best if self.best_by == BEST_BY else []

    @property
    def assumes_sizes(self) -> bool:
        """Whether its sizes are assumed: only the authors' TensorFlow files name theirs."""
        return self.of_authors and not self.network.tf_padding

    @property
    def loss(self) -> LossName:
        """The loss that the network was trained by, cross-entropy if it is not known."""
        return "bce" if self.config.get("loss") == "bce" else "ce"

    @property
    def eval_weights(self) -> State:
        """The weights to evaluate: the averaged ones if there are any."""
        return self.model if self.ema is None else self.ema

"""`Checkpoint`: the content of a checkpoint file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipelines.utils.errors import DataError
from rsnet.config.model_config import ModelConfig

FORMAT = 1

State = Mapping[str, Tensor]

# Fields that the file leaves out if they are None.
_OPTIONAL = ("ema", "optimizer", "scaler", "guard", "ranks")


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
    """Score of the best evaluation so far; empty if there was none."""

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

        Raises DataError if the content is not of such a file.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"of_authors"}
        values = {name: value for name, value in content.items() if name in known}
        try:
            return cls(**values | {"network": ModelConfig.from_dict(content["network"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"it does not describe a network with its weights ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["of_authors"]
        values = {k: v for k, v in values.items() if v is not None or k not in _OPTIONAL}
        return {"format": FORMAT, **values, "network": self.network.to_dict()}

    @property
    def eval_weights(self) -> State:
        """The weights to evaluate: the averaged ones if there are any."""
        return self.model if self.ema is None else self.ema

"""The configured run that training, evaluation and profiling take."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container
from dataclasses import MISSING, Field, dataclass
from typing import Any

import torch

from pipelines.batch import Loaders
from rsnet.config.command_line import as_command
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import ResolvedConfig, recipe_defaults
from rsnet.config.train_config import to_plain_dict
from rsnet.distributed import process_group as distributed
from rsnet.loggers.console import ConsoleLogger
from rsnet.models.shapes import all_gmacs, model_cost
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.models.teacher import Teacher

# Options that the header of a run, or a line of its own, speaks of, and those that say what the command does.
IN_HEADER = {
    "accumulate", "amp", "arch", "batch_size", "data", "device", "evaluate", "output", "profile",
    "profile_limit", "profile_steps", "profile_sweep", "resume", "wandb", "wandb_entity", "wandb_name",
    "wandb_project", "wandb_tags",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """A configured run: what is trained, evaluated or profiled, on what, and where it is shown."""

    script: str
    """The script that was started; commands that are printed name it."""

    config: ResolvedConfig
    options: Any
    """The pipeline's own options, a dataclass."""

    network: ModelConfig
    """Description of `model`."""

    model: ResolutionSwitchable
    loaders: Loaders
    device: torch.device
    console: ConsoleLogger
    teacher: Teacher | None = None

    typed: str = ""
    """The command, as it was typed."""

    @property
    def global_batch(self) -> int:
        """Images of an update."""
        return self.config.global_batch(distributed.world_size())

    @functools.cached_property
    def cost(self) -> dict[str, float]:
        """GMACs an image of the network, at every size and of the ensemble."""
        return model_cost(self.model)

    @functools.cached_property
    def training_cost(self) -> dict[int, float]:
        """GMACs an image in training, whose images may be smaller, by the size that it is trained for."""
        sizes, used = self.config.sizes, self.config.train_sizes
        if used == sizes:
            return {size: self.cost[str(size)] for size in sizes}
        return dict(zip(sizes, all_gmacs(self.model, used), strict=True))

    def command(self, without: Container[str] = ()) -> str:
        """Return the command line that sets every option but those of these names."""
        return as_command(self.script, self.config, self.options, without=without)

    def changed_options(self) -> str:
        """Return the options, as on a command line, that are neither the recipe's nor the defaults.

        Without those that the header of a run has lines for.
        """
        usual = recipe_defaults(self.config, distributed.world_size())
        usual |= {f.name: _default(f) for f in dataclasses.fields(self.options)}
        values = vars(self.config) | vars(self.options)
        same = {name for name, value in values.items() if value == usual[name]}
        return as_command("", self.config, self.options, without=same | IN_HEADER)

    def to_plain_dict(self) -> dict[str, Any]:
        """Return all options, as JSON takes them."""
        return to_plain_dict(self.config) | to_plain_dict(self.options)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()

"""The configured run that training, evaluation and profiling take."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.batch import Loaders
from rsnet.config.command_line import as_command
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import ResolvedConfig
from rsnet.config.train_config import to_plain_dict
from rsnet.distributed import process_group as distributed
from rsnet.loggers.console import ConsoleLogger
from rsnet.models.switchable import ResolutionSwitchable


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

    @property
    def global_batch(self) -> int:
        """Images of an update."""
        return self.config.global_batch(distributed.world_size())

    def command(self, without: Container[str] = ()) -> str:
        """Return the command line that sets every option but those of these names."""
        return as_command(self.script, self.config, self.options, without=without)

    def to_plain_dict(self) -> dict[str, Any]:
        """Return all options, as JSON takes them."""
        return to_plain_dict(self.config) | to_plain_dict(self.options)

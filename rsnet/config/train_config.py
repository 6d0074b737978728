"""All options of a training run, see `topics` and `run_topics`, together. Imports no torch."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, get_type_hints

from pipelines.utils.errors import DataError
from pipelines.utils.location import url_of
from rsnet.config.model_config import canonical_arch
from rsnet.config.option_rules import require_valid
from rsnet.config.recipes import FORMER_NAMES
from rsnet.config.run_topics import (
    CheckpointOptions,
    ComputeOptions,
    DistributedOptions,
    LoggingOptions,
    ProfilingOptions,
)
from rsnet.config.topics import (
    AugmentationOptions,
    DataOptions,
    DistillationOptions,
    ModelOptions,
    OptimizerOptions,
    ScheduleOptions,
    Unset,
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    # The fields of the last base come first.
    ProfilingOptions,
    LoggingOptions[Unset],
    CheckpointOptions[Unset],
    DistributedOptions,
    ComputeOptions[Unset],
    DistillationOptions[Unset],
    AugmentationOptions[Unset],
    ScheduleOptions[Unset],
    OptimizerOptions[Unset],
    ModelOptions[Unset],
    DataOptions[Unset],
    Generic[Unset],
):
    """All options of a training.

    Raises UsageError for a value that is wrong whatever data and network are.
    """

    def __post_init__(self) -> None:
        if self.arch is not None:
            object.__setattr__(self, "arch", canonical_arch(str(self.arch)))
        if (new := FORMER_NAMES.get(str(self.recipe))) is not None:
            object.__setattr__(self, "recipe", new)
        if self.output is not None:
            object.__setattr__(self, "output", url_of(self.output) or str(self.output))
        require_valid(self)

    @property
    def url(self) -> str | None:
        """Where the run is uploaded to, if --output names object storage."""
        return url_of(self.output)

    @property
    def is_profile(self) -> bool:
        """Whether to measure instead of training."""
        return self.profile or self.profile_sweep is not None


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainOptions[None]):
    """Train one network for several input resolutions."""


# The headings of --help.
TOPICS: dict[str, Any] = {
    "data": DataOptions[None],
    "model": ModelOptions[None],
    "optimizer": OptimizerOptions[None],
    "schedule": ScheduleOptions[None],
    "augmentation": AugmentationOptions[None],
    "distillation": DistillationOptions[None],
    "compute": ComputeOptions[None],
    "distributed": DistributedOptions,
    "checkpointing": CheckpointOptions[None],
    "logging": LoggingOptions[None],
    "profiling": ProfilingOptions,
}


def require_options(values: Mapping[str, Any], source: str) -> None:
    """Check the types of what `to_plain_dict` gave, as it was read from a file; unknown names are left alone.

    Raises DataError that names `source` and the first option whose value cannot be one.
    """
    from pydantic import TypeAdapter, ValidationError  # 0.1 s, which only a run to resume needs

    for name, hint in get_type_hints(TrainConfig).items():
        if name in values:
            kind = hint[type(None)] if getattr(hint, "__parameters__", ()) else hint
            try:
                TypeAdapter(kind).validate_python(values[name])
            except ValidationError as error:
                value = reprlib.repr(values[name])
                raise DataError(f"{source}: its option {name} cannot be {value}") from error


def to_plain_dict(options: Any) -> dict[str, Any]:
    """Return a dataclass as JSON and `torch.load(weights_only=True)` take it, which refuses a `Url`."""
    plain = dataclasses.asdict(options)
    return {
        k: str(v) if isinstance(v, Path | str) else list(v) if isinstance(v, tuple) else v
        for k, v in plain.items()
    }

"""An exponential moving average of a network's weights and of every resolution's BatchNorm statistics."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor

from rsnet.models.switchable import ResolutionSwitchable


class Ema:
    """`self.model` averages what `model` was after each update (Polyak & Juditsky 1992; timm's ModelEmaV3).

    Parameters and running statistics are averaged alike, each resolution's with its own; a size that
    takes no part in a step keeps its BatchNorm, and so pulls its average towards it. Counters are
    copied. Until many updates are done the average is shorter, decay (1 + t) / (10 + t) at update t, so
    that it forgets the initialisation.
    """

    def __init__(self, model: ResolutionSwitchable, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._averages, self._copies = _split(self.model)
        self._values, self._counters = _split(model)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network as it is after update `step`, counted from 0. Does not synchronise."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._values, 1 - decay)
        torch._foreach_copy_(self._copies, self._counters)


def _split(model: ResolutionSwitchable) -> tuple[list[Tensor], list[Tensor]]:
    """The state that can be averaged, and the rest: counters."""
    state = cast(dict[str, Tensor], model.state_dict())
    return (
        [v for v in state.values() if v.is_floating_point()],
        [v for v in state.values() if not v.is_floating_point()],
    )

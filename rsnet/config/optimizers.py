"""Optimizers that `--opt` takes, with the learning rate and weight decay of each. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from rsnet.config.recipes import Recipe

OptName = Literal["plain", "nesterov", "adamw", "lamb", "muon"]

# (learning rate for 256 images an update, weight decay); plain and nesterov have the recipe's.
# Scaled linearly with the images. AdamW: DeiT (Touvron et al. 2021, table 9), 1e-3 at 1024, and 0.05. LAMB:
# A2 (Wightman et al. 2021, "ResNet strikes back", table 2), 5e-3 at 2048, and 0.02. Muon's updates are as
# large as AdamW's, whose rate and decay it takes (Liu et al. 2025, "Muon is scalable for LLM training").
LR_AND_WEIGHT_DECAY = {
    "adamw": (2.5e-4, 0.05),
    "lamb": (6.25e-4, 0.02),
    "muon": (2.5e-4, 0.05),
}


def rate_and_decay(opt: OptName, recipe: Recipe) -> dict[str, float]:
    """Return `lr`, for 256 images an update, and `weight_decay` of an optimizer, where none are given."""
    lr, weight_decay = LR_AND_WEIGHT_DECAY.get(opt, (recipe.lr, recipe.weight_decay))
    return {"lr": lr, "weight_decay": weight_decay}


def is_of_other_optimizer(opt: OptName | None, previous: Mapping[str, Any]) -> bool:
    """Return whether learning rate and weight decay of a `previous` run belong to another optimizer."""
    before = previous.get("opt")
    return (
        opt is not None
        and opt != before
        and (opt in LR_AND_WEIGHT_DECAY or before in LR_AND_WEIGHT_DECAY)
    )

"""All that a training is made of, besides its configuration: taken for a checkpoint, and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.utils.errors import blame
from rsnet.checkpoint import io as checkpoint
from rsnet.distributed import process_group as distributed
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.optim import load_momentum
from rsnet.training.trainer import Trainer


def capture(trainer: Trainer, model: ResolutionSwitchable) -> dict[str, Any]:
    """The state after an update. All ranks call it; what they have for themselves is under "ranks"."""
    content = {
        "model": model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "step": trainer.step,
        "guard": trainer.guard.state(),
        "ranks": distributed.gather(_of_this_rank(trainer, model)),
    }
    if trainer.ema:
        content["ema"] = trainer.ema.model.state_dict()
    return content


def restore(trainer: Trainer, model: ResolutionSwitchable, content: Mapping[str, Any]) -> list[str]:
    """Put back what `capture` took, except the weights, which the model has already, and the step.

    Returns what is not as it was, in words.
    """
    missing = []
    if "scaler" in content:
        trainer.scaler.load_state_dict(content["scaler"])
    if "optimizer" not in content or not load_momentum(trainer.optimizer, content["optimizer"]):
        missing.append(
            "the checkpoint has no momentum for these weights: the optimizer starts without"
        )
    if trainer.ema and "ema" in content:
        with blame("--resume: the averaged weights do not fit"):
            checkpoint.load_weights(trainer.ema.model, content, "ema")
    if "guard" in content:
        trainer.guard.load(content["guard"])
    ranks = content.get("ranks", [])
    if len(ranks) == distributed.world_size():
        _load_of_this_rank(trainer, model, ranks[distributed.rank()])
    elif ranks:
        missing.append(
            f"{len(ranks)} processes then, {distributed.world_size()} now: BatchNorm's statistics go on "
            "from those of the first, and random numbers of layers (dropout) are others"
        )
    return missing


def _of_this_rank(trainer: Trainer, model: ResolutionSwitchable) -> dict[str, Any]:
    device = model.alpha.device
    alone = distributed.world_size() == 1  # then the state dicts have all buffers
    return {
        "buffers": [] if alone else [b.cpu() for b in _buffers(trainer, model)],
        "means": trainer.means.state(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _load_of_this_rank(
    trainer: Trainer, model: ResolutionSwitchable, state: Mapping[str, Any]
) -> None:
    device = model.alpha.device
    if state["buffers"]:
        for buffer, value in zip(_buffers(trainer, model), state["buffers"], strict=True):
            buffer.copy_(value)
    trainer.means.load(state["means"], device)
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def _buffers(trainer: Trainer, model: ResolutionSwitchable) -> Sequence[Tensor]:
    """BatchNorm's statistics, which every rank has for itself in training, and their averages."""
    averages = trainer.ema.model.buffers() if trainer.ema else ()
    return [*model.buffers(), *averages]

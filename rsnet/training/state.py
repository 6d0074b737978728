"""Training state besides the weights: what a checkpoint stores of each rank, and how it is restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipelines.batch import Loader
from pipelines.utils.errors import DataError, UsageError, error_context, first_line
from pipelines.utils.memory import is_out_of_memory
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.checkpoint.weights import load_weights
from rsnet.config.resolve import ResolvedConfig
from rsnet.distributed import process_group as distributed
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.optim import load_optimizer_state
from rsnet.training.trainer import Trainer

_HOW = {
    "global-batch": " (without --batch-size and --accumulate it stays on any number of processes)"
}


def restore_position(
    checkpoint: Checkpoint,
    config: ResolvedConfig,
    loader: Loader,
    global_batch: int,
    steps_per_epoch: int,
) -> tuple[int, list[str]]:
    """Put the training loader where a checkpoint was taken.

    Return the updates of its epoch that are done, and what is not as it would have been, in words.

    Raises UsageError if other data, another seed or another global batch would change the order, unless
    --allow-change names it.
    """
    there, here = checkpoint.loader, loader.state_dict()
    if there is None:  # weights alone: there is no order to keep
        return 0, []
    differing = {"data": _other_data(there, here), "seed": _other(["seed"], there, here)}
    problems = [(name, what) for name, found in differing.items() for what in found]
    if checkpoint.global_batch != global_batch:
        problems.append(
            ("global-batch", f"global batch {checkpoint.global_batch} -> {global_batch}")
        )
    refused: dict[str, str] = {}
    for name, what in problems:
        if name not in config.allow_change:
            refused[name] = f"{refused[name]}, {what}" if name in refused else what
    if refused:
        where = "--resume" if config.resume else config.output
        raise UsageError(
            f"{where}: {'; '.join(refused.values())}: the run would not go on with the images that come "
            f"next; change it back{_HOW.get(next(iter(refused)), '')}, or add --allow-change "
            + " ".join(refused)
        )
    moved = [what for _, what in problems]
    if checkpoint.done == 0:
        return 0, moved
    if any(differing.values()):
        loader.set_epoch(checkpoint.epoch)
        return 0, [*moved, f"epoch {checkpoint.epoch + 1} begins anew, in another order"]
    # With another global batch: to the last update that is whole, so that no image is left out.
    done = min(there["position"] // global_batch, steps_per_epoch)
    loader.load_state_dict({**there, "position": done * global_batch})
    return done, moved


def _other(fields: Sequence[str], there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [f"{f} {there[f]} -> {here[f]}" for f in fields if f in there and there[f] != here[f]]


def _other_data(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return how the data of two loader states differ. Different classes have been reported before."""
    is_other = there["data"] != here["data"]  # two pipelines may know images by the same
    found = _other(["pipeline", "samples"] if is_other else ["samples"], there, here)
    if is_other and not found:
        # Version 0.1 did not note the pipeline, and each has a way of its own to know images again.
        unknown = "" if "pipeline" in there else ", or another pipeline reads them"
        found = [f"as many images as before, but others (names, order, labels or sizes){unknown}"]
    return [*found, *_other(["order"], there, here)]


def training_state(trainer: Trainer, model: ResolutionSwitchable) -> dict[str, Any]:
    """Return the fields of a `Checkpoint` that training changes. All ranks have to call it."""
    state = {
        "model": model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "step": trainer.step,
        "guard": trainer.guard.state(),
        "ranks": distributed.all_gather_object(_of_this_rank(trainer, model)),
    }
    if trainer.ema:
        state["ema"] = trainer.ema.model.state_dict()
    return state


@contextmanager
def _state_in_one_line() -> Iterator[None]:
    """Turn the errors that PyTorch raises for a malformed state into a one-line DataError."""
    try:
        yield
    except (UsageError, DataError):
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(
            f"--resume: the state beside the weights does not fit ({reason}); --pretrained takes the weights"
        ) from error


@_state_in_one_line()
def load_training_state(
    trainer: Trainer, model: ResolutionSwitchable, checkpoint: Checkpoint
) -> list[str]:
    """Put back what `training_state` took, except the weights, which the model has already, and the step.

    Return what is not as it was, in words.
    """
    missing = []
    if checkpoint.scaler and trainer.scaler.is_enabled():  # empty unless the run used float16
        trainer.scaler.load_state_dict(checkpoint.scaler)
    saved = checkpoint.optimizer
    if saved is None or not load_optimizer_state(trainer.optimizer, saved):
        missing.append(
            "the checkpoint has no momentum for these weights: the optimizer starts without"
        )
    if trainer.ema and checkpoint.ema is not None:
        with error_context("the checkpoint's averaged weights do not fit"):
            load_weights(trainer.ema.model, checkpoint.ema, checkpoint.network.sizes)
    if checkpoint.guard is not None:
        trainer.guard.load(checkpoint.guard)
    ranks = checkpoint.ranks or []
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
        # The lengths differ if averaging was turned on or off since.
        for buffer, value in zip(_buffers(trainer, model), state["buffers"], strict=False):
            buffer.copy_(value)
    trainer.means.load(state["means"], device)
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def _buffers(trainer: Trainer, model: ResolutionSwitchable) -> Sequence[Tensor]:
    """Return BatchNorm's statistics, which every rank has for itself in training, and their averages."""
    averages = trainer.ema.model.buffers() if trainer.ema else ()
    return [*model.buffers(), *averages]

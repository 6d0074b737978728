"""The optimizer, the learning rate of every step, and averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rsnet.config.optimizers import OptName
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.lr_scales import lr_scales

LrDecay = Literal["cosine", "step", "linear", "schedule"]


# Not torch.optim.lr_scheduler: its cosine is computed from step to step, and differs from the original's in
# the last bit at 854 of 1,000 steps; and a run that is resumed elsewhere would need its state converted.
@dataclass(frozen=True)
class LrSchedule:
    """The learning rate as the original has it: decays by iteration, or by epoch for step and schedule.

    steps, warmup_steps: optimizer steps. milestones: epochs, for "schedule". step_epochs: for "step".
    """

    lr: float
    decay: LrDecay
    steps: int
    steps_per_epoch: int
    warmup_steps: int = 0
    gamma: float = 0.1
    step_epochs: int = 30
    milestones: tuple[int, ...] = ()

    def at(self, step: int) -> float:
        """Return the rate of optimizer step `step`, counted from 0.

        Warm-up rises linearly from 0 to `lr`, which the step after it has; cosine and linear fall over the
        steps that are left, step and schedule at their epochs.
        """
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        step = min(step, self.steps)
        epoch = step // self.steps_per_epoch
        share = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        if self.decay == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * share))
        if self.decay == "linear":
            return self.lr * (1 - share)
        if self.decay == "step":
            return float(self.lr * self.gamma ** (epoch // self.step_epochs))
        return float(self.lr * self.gamma ** sum(epoch >= m for m in self.milestones))


def make_optimizer(
    model: nn.Module,
    opt: OptName,
    lr: float,
    momentum: float,
    weight_decay: float,
    norm_decay: bool = True,
    *,
    layer_decay: float = 1.0,
    norm_lr_mult: float = 1.0,
) -> torch.optim.Optimizer:
    """Return an optimizer of every parameter, whose updates `found_inf` skips on the device.

    opt: plain and nesterov as `make_sgd`; adamw: torch's, with `momentum` as its beta1; lamb and muon: see
    `rsnet.training.timm_optimizers`. layer_decay, norm_lr_mult: see `param_groups`.

    Raises ModuleNotFoundError without timm, UsageError for one that is too old.
    """
    groups = param_groups(model, weight_decay, norm_decay, layer_decay, norm_lr_mult)
    if opt in ("plain", "nesterov"):
        return _sgd(groups, lr, momentum, nesterov=opt == "nesterov")
    # For CUDA graphs; it keeps the step counts on the GPU.
    capturable = next(model.parameters()).device.type == "cuda"
    if opt == "adamw":
        betas = (momentum, 0.999)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True, capturable=capturable)
    from rsnet.training import timm_optimizers

    if opt == "lamb":
        return timm_optimizers.make_lamb(groups, lr, momentum, _owners(model))
    return timm_optimizers.make_muon(groups, lr, momentum, capturable)


def _owners(model: nn.Module) -> dict[Tensor, int]:
    """Return {parameter of a private BatchNorm: index of its size, from 1}."""
    if not isinstance(model, ResolutionSwitchable):
        return {}
    return {
        parameter: place
        for place, size in enumerate(model.sizes, 1)
        for norm in model.norms_of([size])
        for parameter in norm.parameters()
    }


def param_groups(
    model: nn.Module,
    weight_decay: float,
    norm_decay: bool = True,
    layer_decay: float = 1.0,
    norm_lr_mult: float = 1.0,
) -> list[dict[str, Any]]:
    """Return two parameter groups: filters; and one-dimensional parameters (norm layers, biases, alpha),
    which get no weight decay if `norm_decay` is False (He et al. 2019, section 3.1).

    layer_decay, norm_lr_mult: if one is not 1, both groups are split by `lr_scale` (see `lr_scales`), a
    factor of the learning rate as in timm's schedulers; `model` must then be switchable.
    """
    if (layer_decay, norm_lr_mult) != (1, 1):
        scales = lr_scales(cast(ResolutionSwitchable, model), layer_decay, norm_lr_mult)
        return [
            # Group only consecutive parameters, so that a state dict keeps their order: a run resumed with
            # another layer decay still finds its momentum.
            {"params": list(run), "weight_decay": group["weight_decay"], "lr_scale": lr_scale}
            for group in param_groups(model, weight_decay, norm_decay)
            for lr_scale, run in groupby(group["params"], lambda p: scales.get(p, 1.0))
        ]
    filters = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": filters, "weight_decay": weight_decay},
        {"params": others, "weight_decay": weight_decay if norm_decay else 0.0},
    ]


def make_sgd(
    model: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    norm_decay: bool = True,
    nesterov: bool = False,
) -> torch.optim.SGD:
    """Return SGD on every parameter, all with weight decay: BatchNorm and alpha, too, as the original has it.

    norm_decay: see `param_groups`. nesterov: Nesterov's momentum, if there is any. One fused kernel per
    dtype, which can skip an update on the device (`found_inf`).
    """
    return _sgd(param_groups(model, weight_decay, norm_decay), lr, momentum, nesterov)


def _sgd(
    groups: list[dict[str, Any]], lr: float, momentum: float, nesterov: bool
) -> torch.optim.SGD:
    nesterov = nesterov and momentum > 0
    sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum > 0:
        # Otherwise a skipped first update, common with float16, would leave the buffers uninitialised.
        for parameter in (p for group in groups for p in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate, of a layer times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


# What an optimizer keeps of a parameter, see `load_optimizer_state`.
ADAMS = {"step", "exp_avg", "exp_avg_sq"}
STATE: dict[str, list[set[str]]] = {
    "AdamW": [ADAMS],
    "DeviceLamb": [ADAMS - {"step"}],
    "Muon": [{"use_muon", "momentum_buffer"}, {"use_muon", *ADAMS}],
}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> bool:
    """Take over the momentum and other state of a saved state dict of the same optimizer; rate and decay
    stay. Return False, and do nothing, if it is of another, or not of the same parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if [n for group in saved["param_groups"] for n in group["params"]] != [*range(len(parameters))]:
        return False
    if isinstance(optimizer, torch.optim.SGD):
        return _load_sgd(optimizer, parameters, saved["state"])
    known = STATE[type(optimizer).__name__]
    for i, state in saved["state"].items():  # a parameter without gradients has none
        shapes = {tuple(v.shape) for name, v in state.items() if name not in ("step", "use_muon")}
        if set(state) not in known or shapes != {tuple(parameters[i].shape)}:
            return False
    counts = [group["step"] for group in saved["param_groups"] if "step" in group]
    if any("step" in group and not counts for group in optimizer.param_groups):
        return False
    # LAMB's counts, which timm would move to the CPU. A group has those of its own parameters, others 0.
    steps = [group.pop("step", None) for group in optimizer.param_groups]
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
    for group, step in zip(optimizer.param_groups, steps, strict=True):
        if step is not None:
            group["step"] = step.copy_(torch.stack(counts).amax(0))
            cast(Any, optimizer).forget_counts_of_unknown(step)
    return True


def _load_sgd(
    sgd: torch.optim.SGD, parameters: Sequence[Tensor], saved: Mapping[int, Mapping[str, Any]]
) -> bool:
    if not sgd.state and not saved:
        return True  # --momentum 0
    buffers = [saved.get(i, {}).get("momentum_buffer") for i in range(len(parameters))]
    if any(b is None or b.shape != p.shape for b, p in zip(buffers, parameters, strict=True)):
        return False
    for parameter, buffer in zip(parameters, buffers, strict=True):
        if parameter in sgd.state:  # not with --momentum 0
            sgd.state[parameter]["momentum_buffer"].copy_(buffer)
    return True


# Not torch.optim.swa_utils.AveragedModel: it reads its counter on the device at each update, for which the
# host waits, its decay is constant, and its first update copies the network.
class ModelEma:
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
    """Return the state that can be averaged, and the rest: counters."""
    state = cast(dict[str, Tensor], model.state_dict())
    return (
        [v for v in state.values() if v.is_floating_point()],
        [v for v in state.values() if not v.is_floating_point()],
    )

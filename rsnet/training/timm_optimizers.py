"""LAMB and Muon of timm, so that an update can be skipped on the device. timm takes seconds to import."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import timm
import timm.optim.lamb
import torch
from torch import Tensor

from pipelines.utils.errors import UsageError

# As timm 1.0.31 has it: with `lamb` as a function, and a Muon that can be captured.
if not hasattr(timm.optim.lamb, "lamb"):
    raise UsageError(f"--opt: timm {timm.__version__} is too old for it: pip install -U timm")


GROUP = 128  # tensors that are put back together


class DeviceLamb(timm.optim.lamb.Lamb):
    """timm's LAMB, which counts updates on the device: timm's own reads that number on the host.

    owners: {parameter: group of parameters that get gradients in the same updates, such as the BatchNorms
    of one size}; others are in group 0. Each group has its own update count; with a shared one, the bias
    correction would make the first updates of a size that joins late too large.
    """

    def __init__(
        self, groups: list[dict[str, Any]], owners: Mapping[Tensor, int], **more: Any
    ) -> None:
        super().__init__(groups, **more)
        device = next(_parameters(self)).device
        self._owners = owners
        count = 1 + max(owners.values(), default=0)
        for group in self.param_groups:
            group["step"] = torch.zeros(count, dtype=torch.float64, device=device)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Do an update. It clips the gradients' norm to 1 beforehand, as timm's does by default."""
        norm = self._get_clip_grad_norm()  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            together: dict[int, list[Any]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    together.setdefault(self._owners.get(p, 0), []).append(p)
            for owner, parameters in together.items():
                self._update(group, parameters, group["step"][owner], norm)

    def forget_counts_of_unknown(self, step: Tensor) -> None:
        """Set to 0 what was counted for parameters without state: earlier versions had one count for all."""
        known = {self._owners.get(p, 0) for p in self.state}
        for owner in {*range(len(step))} - known:
            step[owner] = 0

    def _update(
        self, group: dict[str, Any], parameters: list[Any], step: Tensor, norm: Tensor | None
    ) -> None:
        step += 1
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        beta1, beta2 = group["betas"]
        timm.optim.lamb.lamb(
            parameters,
            [p.grad for p in parameters],
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            norm,
            beta1=beta1,
            beta2=beta2,
            beta3=1 - beta1,
            bias_correction1=(1 - beta1**step).float(),
            bias_correction2=(1 - beta2**step).float(),
            max_lr=None,
            **{name: group[name] for name in ("lr", "eps", "weight_decay", "foreach")},
            **{
                name: group[name]
                for name in ("decoupled_decay", "trust_clip", "always_adapt", "caution")
            },
        )


def make_lamb(
    groups: list[dict[str, Any]], lr: float, momentum: float, owners: Mapping[Tensor, int]
) -> torch.optim.Optimizer:
    """Return LAMB with `momentum` as its beta1. owners: see `DeviceLamb`."""
    # Unset, timm takes a tensor at a time if the rate is a tensor, as in a CUDA graph: of a ResNet-50 at five
    # sizes 14,127 operations an update in place of 259.
    foreach = True if groups[0]["params"][0].is_cuda else None
    return _skip_on_device(
        DeviceLamb(groups, owners, lr=lr, betas=(momentum, 0.999), foreach=foreach)
    )


def make_muon(
    groups: list[dict[str, Any]], lr: float, momentum: float, capturable: bool
) -> torch.optim.Optimizer:
    """Return Muon, which flattens filters to matrices, with AdamW at the same rate for all other
    parameters.
    """
    from timm.optim.muon import Muon  # a timm that is too old has none

    muon = Muon(groups, lr=lr, momentum=momentum, fallback_lr_scale=1.0, capturable=capturable)
    return _skip_on_device(muon)


def _skip_on_device(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let `found_inf` skip updates, and `grad_scale` unscale gradients, as torch's fused optimizers do.

    Copies weights and state before a step, and restores them if it is to be skipped: twice the memory.
    Grouped into few kernels, because one per tensor would take the host longer than the update of a
    ResNet-50.
    """
    kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def keep(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            torch._foreach_mul_(gradients, scale.reciprocal())
        if hasattr(optimizer, "found_inf"):
            for group in _groups(_tensors(optimizer)):
                copies = [torch.empty_like(_flat(t)) for t in group]
                torch._foreach_copy_(copies, [_flat(t) for t in group])
                kept.update(zip(map(id, group), copies, strict=True))

    @torch.no_grad()
    def put_back(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if not kept:
            return
        bad = optimizer.found_inf > 0  # type: ignore[attr-defined]
        for group in _groups(_tensors(optimizer)):
            now = [_flat(t) for t in group]
            # State that the update has made began with zeros.
            before = [kept[id(t)] if id(t) in kept else torch.zeros_like(_flat(t)) for t in group]
            chosen = torch.where(bad, torch.cat(before), torch.cat(now))
            torch._foreach_copy_(now, torch.split(chosen, [len(x) for x in now]))
        kept.clear()

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(put_back)
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    return optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _flat(tensor: Tensor) -> Tensor:
    """Return a view of all numbers of a tensor, in the order in which they lie, channels-last or not."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _groups(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of the same precision, as many at a time as bound the memory of what is made of them."""
    by_dtype = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    for same in by_dtype.values():
        for i in range(0, len(same), GROUP):
            yield same[i : i + GROUP]


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield all that an update changes."""
    yield from _parameters(optimizer)
    for holder in (*optimizer.state.values(), *optimizer.param_groups):
        yield from (value for value in holder.values() if isinstance(value, Tensor))

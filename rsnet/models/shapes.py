"""GMACs of a network, and the input sizes that it supports, computed from shapes on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from pipelines.utils.errors import UsageError, first_line
from rsnet.losses import ENSEMBLE
from rsnet.models.quantization.lq_nets import Quantizer
from rsnet.models.switchable import ResolutionSwitchable, SwitchableBatchNorm2d

Network = TypeVar("Network", bound=nn.Module)

# Pixels of an image that is large enough to see how often a network halves it.
PROBE = 320

# Layers whose output has the shape of their input.
UNCHANGED = (
    _BatchNorm, SwitchableBatchNorm2d, Quantizer, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.ReLU, nn.SiLU,
)  # fmt: skip


def gmacs(model: nn.Module, size: int) -> float:
    """Return the forward GMACs (10^9 multiply-accumulates) of one (3, size, size) image."""
    return all_gmacs(model, [size])[0]


def all_gmacs(model: nn.Module, sizes: Sequence[int]) -> list[float]:
    """Return what `gmacs` does of each size."""
    on_meta = _shape_only(model)
    return [_gmacs_of_shapes(on_meta, size) for size in sizes]


def model_cost(model: ResolutionSwitchable) -> dict[str, float]:
    """Return the GMACs of one image at each of a network's sizes, and of the ensemble, by their names."""
    costs = all_gmacs(model, model.sizes)
    return dict(zip(map(str, model.sizes), costs, strict=True)) | {ENSEMBLE: sum(costs)}


def _gmacs_of_shapes(on_meta: nn.Module, size: int) -> float:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        _forward(on_meta, size)
    return float(counter.get_total_flops()) / 2e9  # PyTorch counts additions, too


def check_sizes(
    model: ResolutionSwitchable,
    arch: str,
    sizes: Sequence[int] | None = None,
    option: str = "--sizes",
) -> None:
    """Raise UsageError if the network cannot run at one of these sizes, by default its own, or shrinks it to
    next to nothing.

    option: what the sizes come from.
    """
    sizes = sizes or model.sizes
    on_meta = _shape_only(model)
    failures = {size: error for size in sizes if (error := _failure(on_meta, size))}
    works = [size for size in sizes if size not in failures]
    fixed = _fixed_size(model.network)
    for size, error in failures.items():
        alone = f"; it takes {fixed} alone" if fixed else ""
        if not alone and works:
            alone = f"; of these sizes, it works at {' '.join(map(str, works))}"
        raise UsageError(
            f"{option}: {arch} does not work at {size} ({first_line(error)}){alone}"
        ) from error
    # Under half the stride, the last two stages have one pixel: their 3x3 filters act as 1x1 filters.
    stride = _total_stride(on_meta)
    smallest = min(sizes)
    if smallest < stride // 2:
        raise UsageError(
            f"{option}: {smallest} is too small for {arch}, which shrinks its input {stride} times; "
            f"use {stride // 2} or more"
        )


def _failure(on_meta: ResolutionSwitchable, size: int) -> Exception | None:
    """Return what a forward at `size` raises, if anything; libraries raise what they like."""
    try:
        with torch.no_grad():
            _forward(on_meta, size)
    except Exception as error:
        return error
    return None


def _forward(on_meta: nn.Module, size: int) -> None:
    """Compute the shapes of an image of any size, with whatever BatchNorm."""
    own = on_meta.sizes[:1] if isinstance(on_meta, ResolutionSwitchable) else ()
    on_meta(torch.empty(1, 3, size, size, device="meta"), *own)


def _fixed_size(network: nn.Module) -> int | None:
    """Return the input size of a timm network that supports only one, by its `default_cfg`; else None."""
    known = getattr(network, "default_cfg", None) or {}
    return known["input_size"][-1] if known.get("fixed_input_size") else None


def _total_stride(on_meta: ResolutionSwitchable) -> int:
    """Return how many times smaller the last spatial feature map is than a large image.

    Networks that take no other image than those of their size are watched at that.
    """
    smallest = 0

    def watch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal smallest
        if output.shape[-1] > 1:
            smallest = min(smallest, output.shape[-1])

    hooks = [m.register_forward_hook(watch) for m in on_meta.modules() if isinstance(m, nn.Conv2d)]
    try:
        for probe in (PROBE, on_meta.sizes[0]):
            smallest = probe
            if _failure(on_meta, probe) is None:
                return round(probe / smallest)
    finally:
        for hook in hooks:
            hook.remove()
    return 1


def _shape_only(model: Network) -> Network:
    """Return a copy without numbers, which computes shapes, and without layers that change none.

    PyTorch takes these apart on the meta device: six forwards of ResNet-50 take 1.1 s with them and 0.06
    without, of MobileNetV3 0.9 s with its activations and 0.3 without.
    """
    replaced: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        replaced[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        replaced[id(buffer)] = torch.empty_like(buffer, device="meta")
    for module in model.modules():
        if isinstance(module, UNCHANGED):
            replaced[id(module)] = _FirstInput()
    return copy.deepcopy(model, replaced).eval()


class _FirstInput(nn.Module):
    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return x

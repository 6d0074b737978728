"""Mixed precision for several passes over the same weights: each weight is cast once, not once a pass.

By itself, autocast would cast every weight five times, cast its five gradients back, and add these up. A GPU
with few images a step waits for the host to launch so many small kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}

# Weights that are cast, and whose gradients are summed, by the same kernels: 8 MB in float32, or one larger
# layer. No gradient of them is ready before the last is, and DDP waits for those of a bucket, of 25 MB.
GROUP = 2**21
# Of the backward nodes that are ready, autograd runs the one with the highest sequence number, usually
# the newest.
FIRST = 2**62


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Return torch.autocast without its weight cache, or a disabled one if `dtype` is None.

    With the cache, the five gradients of a shared weight would be added in half precision, not in float32.
    """
    return torch.autocast(
        device.type, dtype=dtype or torch.float32, enabled=dtype is not None, cache_enabled=False
    )


def castable_layers(network: nn.Module) -> list[nn.Module]:
    """Return the convolutions and linear layers that use their weight as it is.

    Those of other libraries may first compute with it, which half precision must not change.
    """
    return [
        m
        for m in network.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
        and type(m).__module__.split(".")[0] in ("torch", "rsnet")
        and m._parameters.get("weight") is not None
    ]


def store_weights_in(dtype: torch.dtype, network: nn.Module) -> None:
    """Cast once the weights that autocast would cast in each forward: the same bits in half the memory.

    For inference alone. At batch 1 a ResNet-18 spends a tenth of its time on that.
    """
    for layer in castable_layers(network):
        for name, value in list(layer.named_parameters(recurse=False)):
            # A new parameter, because a folded network shares its classifier with the original network.
            setattr(layer, name, nn.Parameter(value.to(dtype), requires_grad=False))


@contextmanager
def cast_weights_once(layers: Sequence[nn.Module], passes: int) -> Iterator[Callable[[int], None]]:
    """Cast the trained weights, under autocast, once for all passes within.

    Yields a function that is to be called with the index of each pass before it. Each pass has tensors of its
    own, of the same memory: so their gradients arrive one by one, and are summed in float32, in the order and
    to the bits in which autocast without its cache does it. (If one pass calls a layer twice, these two
    gradients are first added in half precision.)
    """
    trained = [m for m in layers if (p := _parameter(m)).requires_grad and p.dtype == torch.float32]
    device = _parameter(trained[0]).device.type if trained else "cpu"
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not trained or not is_on:
        yield lambda _number: None
        return
    dtype = torch.get_autocast_dtype(device)
    casts = [
        (group, _Cast.apply(dtype, passes, *map(_parameter, group))) for group in _groups(trained)
    ]
    for _, copies in casts:
        if copies[0].grad_fn is not None:
            # Older than all forwards, it would wait for the end of the backward, and DDP with it.
            copies[0].grad_fn._set_sequence_nr(FIRST)

    def begin(number: int) -> None:
        for group, copies in casts:
            for i, layer in enumerate(group, number * len(group)):
                vars(layer)["weight"] = copies[i]  # found before the parameter of that name

    try:
        yield begin
    finally:
        for layer in trained:
            vars(layer).pop("weight", None)


class _Cast(torch.autograd.Function):
    """Casts float32 weights: returns a copy for each pass, those of the first pass first."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, passes: int, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.count = len(weights)
        return tuple(w.detach() for w in _cast(weights, dtype) * passes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # The gradients of each weight, in the order of the backward, which begins with the last pass.
        arrived = [
            [g for g in reversed(gradients[i :: ctx.count]) if g is not None]
            for i in range(ctx.count)
        ]
        used = [of_weight for of_weight in arrived if of_weight]
        if not used:
            return None, None, *(None for _ in arrived)
        totals = _cast([first for first, *_ in used], torch.float32)
        for more in zip_longest(*(others for _, *others in used)):
            pairs = [(total, g) for total, g in zip(totals, more, strict=True) if g is not None]
            exact = _cast([g for _, g in pairs], torch.float32)
            torch._foreach_add_([total for total, _ in pairs], exact)
        of_used = iter(totals)
        return None, None, *(next(of_used) if of_weight else None for of_weight in arrived)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return copies of `tensors` in another precision, by one operation."""
    results = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(results, list(tensors))
    return results


def _groups(layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Group neighbouring layers, from the last to the first.

    So the group that may stay small is that of the first layers, whose gradients come last.
    """
    groups: list[list[nn.Module]] = []
    left = 0
    for layer in reversed(layers):
        size = _parameter(layer).numel()
        if not groups or size > left:
            groups.append([])
            left = GROUP
        groups[-1].append(layer)
        left -= size
    return groups


def _parameter(layer: nn.Module) -> nn.Parameter:
    """Return a layer's weight, also within `cast_weights_once`."""
    parameter = layer._parameters["weight"]
    assert parameter is not None
    return parameter

"""Activation checkpointing of blocks: less memory for a second forward (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from rsnet.models.autocast import castable_layers
from rsnet.models.quantization.lq_nets import Quantizer
from rsnet.models.switchable import SwitchableBatchNorm2d

What = Literal["norm", "blocks"]
Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def convert_to_checkpointed(network: nn.Module, what: What) -> int:
    """Checkpoint the activations of the blocks of a switchable network, in place.

    Blocks are the members of the outermost `nn.Sequential`s that have BatchNorm: a residual block, a stage.
    what: "norm", they keep the outputs of their convolutions, and the backward computes normalisation,
    activation and sums again; "blocks", they keep their input alone. The numbers stay the same bits, random
    ones too (dropout, stochastic depth): the generators are set back for the second forward, in every block,
    as no list of classes tells which ones draw. BatchNorm's running statistics are updated once. Returns the
    number of blocks.
    """
    count = 0
    for module in network.children():
        if isinstance(module, nn.Sequential):
            for block in module:
                norms = [m for m in block.modules() if isinstance(m, SwitchableBatchNorm2d)]
                if norms and not isinstance(block, SwitchableBatchNorm2d):
                    _make_checkpointed(block, norms, what)
                    count += 1
        else:
            count += convert_to_checkpointed(module, what)
    return count


def _make_checkpointed(block: nn.Module, norms: list[SwitchableBatchNorm2d], what: What) -> None:
    """Make the block's class a subclass of its own, so that names, copies and all else stay."""
    kind = type(block)
    block.__class__ = type(f"Checkpointed{kind.__name__}", (_Checkpointed, kind), {})
    checkpointed: Any = block
    checkpointed.checkpointed_norms = tuple(norms)
    checkpointed.checkpointed_quantizers = [m for m in block.modules() if isinstance(m, Quantizer)]
    checkpointed.checkpointed_layers = castable_layers(block)
    checkpointed.checkpointed_what = what
    # What is kept may not be overwritten: the block's input, and the outputs of convolutions.
    for module in block.modules():
        if getattr(module, "inplace", False) is True:
            vars(module)["inplace"] = False


class _Checkpointed(nn.Module):
    """A mixin before a block's class."""

    checkpointed_norms: tuple[SwitchableBatchNorm2d, ...]
    checkpointed_quantizers: list[Quantizer]
    checkpointed_layers: list[nn.Module]
    checkpointed_what: What

    def forward(self, *inputs: Any) -> Any:
        forward: Callable[..., Any] = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return forward(*inputs)
        return checkpoint(
            # HRNet's blocks put their results into the list that they are given: each time it is a new one.
            lambda *given: forward(*tree_map(lambda value: value, given)),
            *inputs,
            use_reentrant=False,
            context_fn=partial(self._contexts, self.checkpointed_norms[0].active),
        )

    def _contexts(self, active: int) -> Contexts:
        """Return the contexts of the forward and of its repetition, for the resolution that is active now."""
        # Reuse the weights that were quantized or cast once for all resolutions.
        cached = {quantizer: quantizer.cached for quantizer in self.checkpointed_quantizers}
        weights = {m: vars(m)["weight"] for m in self.checkpointed_layers if "weight" in vars(m)}
        first, second = nullcontext(), nullcontext()
        if self.checkpointed_what == "norm":
            first, second = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
        return first, _recomputing(self.checkpointed_norms, cached, weights, active, second)


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    is_convolution = operator is torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if is_convolution else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _recomputing(
    norms: tuple[SwitchableBatchNorm2d, ...],
    quantizers: dict[Quantizer, Tensor | None],
    weights: dict[nn.Module, Tensor],
    active: int,
    inner: AbstractContextManager[None],
) -> Iterator[None]:
    """Repeat a forward of the resolution with index `active`, without updating statistics a second time.

    norms: the switchable BatchNorms. quantizers: with the cached weights of the first forward. weights: the
    copies that layers had then in place of their own, see `rsnet.models.autocast.cast_weights_once`.
    """
    before = [norm.active for norm in norms]
    layers: list[Any] = [norm.by_resolution[active] for norm in norms]
    held = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for norm, layer in zip(norms, layers, strict=True):
        # Without running statistics it would keep fewer tensors than in the forward. SyncBatchNorm insists
        # on a counter.
        needs_counter = isinstance(layer, nn.SyncBatchNorm)
        spare = torch.zeros_like(layer.num_batches_tracked) if needs_counter else None
        norm.active, layer.momentum, layer.num_batches_tracked = active, 0.0, spare
    for quantizer, value in quantizers.items():
        quantizer.counting, quantizer.cached = False, value
    for layer, weight in weights.items():
        vars(layer)["weight"] = weight
    try:
        with inner:
            yield
    finally:
        for layer in weights:
            vars(layer).pop("weight", None)
        for quantizer in quantizers:
            quantizer.counting, quantizer.cached = True, None
        for norm, layer, was, (momentum, count) in zip(norms, layers, before, held, strict=True):
            norm.active, layer.momentum, layer.num_batches_tracked = was, momentum, count

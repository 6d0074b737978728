"""Memory for time: what a block does not keep for its backward is computed again there (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
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
    """Let the blocks of a switchable network compute again in the backward what they do not keep, in place.

    Blocks are the members of the outermost `nn.Sequential`s that have BatchNorm: a residual block, a stage.
    norm: they keep the outputs of their convolutions; normalisation, activation and sums are computed
    again. blocks: they keep their input alone. The numbers stay the same bits; BatchNorm's running statistics
    are updated once. Returns the number of blocks.
    """
    count = 0
    for module in network.children():
        if isinstance(module, nn.Sequential):
            for block in module:
                norms = [m for m in block.modules() if isinstance(m, SwitchableBatchNorm2d)]
                if norms and not isinstance(block, SwitchableBatchNorm2d):
                    _make_recomputed(block, norms, what)
                    count += 1
        else:
            count += convert_to_checkpointed(module, what)
    return count


def _make_recomputed(block: nn.Module, norms: list[SwitchableBatchNorm2d], what: What) -> None:
    """A subclass of its own class, so that names, copies and all else stay as they are."""
    kind = type(block)
    block.__class__ = type(f"Recomputed{kind.__name__}", (_Recomputed, kind), {})
    recomputed: Any = block
    recomputed.recomputed_norms = tuple(norms)
    recomputed.recomputed_quantizers = [m for m in block.modules() if isinstance(m, Quantizer)]
    recomputed.recomputed_layers = castable_layers(block)
    recomputed.recomputed_what = what
    recomputed.recomputed_draws = any(isinstance(m, _DropoutNd) for m in block.modules())


class _Recomputed(nn.Module):
    """Put before a block's class."""

    recomputed_norms: tuple[SwitchableBatchNorm2d, ...]
    recomputed_quantizers: list[Quantizer]
    recomputed_layers: list[nn.Module]
    recomputed_what: What
    recomputed_draws: bool

    def forward(self, *inputs: Any) -> Any:
        forward: Callable[..., Any] = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return forward(*inputs)
        return checkpoint(
            forward,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=self.recomputed_draws,
            context_fn=partial(self._contexts, self.recomputed_norms[0].active),
        )

    def _contexts(self, active: int) -> Contexts:
        """Of the forward, and of its repetition, for the resolution that is active now."""
        # What is quantized or cast once for all resolutions is not quantized or cast again.
        held = {quantizer: quantizer.held for quantizer in self.recomputed_quantizers}
        weights = {m: vars(m)["weight"] for m in self.recomputed_layers if "weight" in vars(m)}
        again = _again(self.recomputed_norms, held, weights, active)
        if self.recomputed_what == "blocks":
            return nullcontext(), again
        first, cached = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
        return first, _both(again, cached)


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    is_convolution = operator is torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if is_convolution else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _again(
    norms: tuple[SwitchableBatchNorm2d, ...],
    quantizers: dict[Quantizer, Tensor | None],
    weights: dict[nn.Module, Tensor],
    active: int,
) -> Iterator[None]:
    """The private BatchNorms of that resolution, and quantizers; what they keep of what they see stays.

    quantizers: with the weights that they gave then, if not to this block alone. weights: what layers had
    then in place of their own, see `rsnet.models.autocast.shared_weight_casts`.
    """
    before = [norm.active for norm in norms]
    layers: list[Any] = [norm.by_resolution[active] for norm in norms]
    held = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for norm, layer in zip(norms, layers, strict=True):
        # Without running statistics it would keep fewer tensors than in the forward.
        norm.active, layer.momentum, layer.num_batches_tracked = active, 0.0, None
    for quantizer, value in quantizers.items():
        quantizer.counting, quantizer.held = False, value
    for layer, weight in weights.items():
        vars(layer)["weight"] = weight
    try:
        yield
    finally:
        for layer in weights:
            vars(layer).pop("weight", None)
        for quantizer in quantizers:
            quantizer.counting, quantizer.held = True, None
        for norm, layer, was, (momentum, count) in zip(norms, layers, before, held, strict=True):
            norm.active, layer.momentum, layer.num_batches_tracked = was, momentum, count


@contextmanager
def _both(
    first: AbstractContextManager[None], second: AbstractContextManager[None]
) -> Iterator[None]:
    with first, second:
        yield

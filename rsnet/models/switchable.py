"""Private BatchNorm per resolution; everything else shared (Wang et al. 2020, section 3.1)."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rsnet.models.autocast import cast_weights_once, castable_layers
from rsnet.models.quantization.lq_nets import (
    Quantizer,
    quantize_weights_once,
    quantized_layers,
)


class SwitchableBatchNorm2d(nn.Module):
    """n private copies of a BatchNorm layer, of which `active` is applied.

    `active` is a plain attribute: torch.compile and torch.export read it as a constant, deepcopy and
    DDP need not know of it. Nothing but the norm is private: the activation of timm's BatchNormAct2d
    is one module in all copies.
    """

    def __init__(self, norm: _BatchNorm, n: int) -> None:
        super().__init__()
        self.by_resolution = nn.ModuleList(_private_copy(norm) for _ in range(n))
        self.active = 0

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """Apply the active BatchNorm. more: further inputs of the layer, such as the residual of a fused
        one.
        """
        return cast(Tensor, self.by_resolution[self.active](x, *more))


def _private_copy(norm: _BatchNorm) -> _BatchNorm:
    """Return a copy with parameters and buffers of its own; all else stays shared by identity.

    copy.deepcopy takes six times as long: 0.1 s for the 265 layers of a ResNet-50 of five sizes.
    """
    twin = copy.copy(norm)
    for name, value in vars(norm).items():
        if isinstance(value, dict | set):  # of parameters, buffers, children, hooks
            vars(twin)[name] = value.copy()
    for name, parameter in norm._parameters.items():
        if parameter is not None:
            own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            twin._parameters[name] = own
    for name, buffer in norm._buffers.items():
        if buffer is not None:
            twin._buffers[name] = buffer.clone()
    return twin


def make_switchable(network: nn.Module, n: int) -> nn.Module:
    """Turn every BatchNorm layer of `network` into n private ones, in place.

    Any subclass of PyTorch's BatchNorm counts: SyncBatchNorm, timm's BatchNormAct2d. A layer that is used
    in several places stays one layer. Returns `network` (or its replacement, if it is a
    BatchNorm itself), as `nn.SyncBatchNorm.convert_sync_batchnorm` does.

    Raises ValueError for n < 1, for a network without BatchNorm, or one that is switchable already.
    """
    if n < 1:
        raise ValueError(f"a switchable network needs at least one resolution, not {n}")
    if any(isinstance(m, SwitchableBatchNorm2d) for m in network.modules()):
        raise ValueError("the network is switchable already")
    if not any(isinstance(m, _BatchNorm) for m in network.modules()):
        raise ValueError(f"{type(network).__name__} has no BatchNorm to make private")
    return _replace(network, n, {})


def _replace(module: nn.Module, n: int, done: dict[int, nn.Module]) -> nn.Module:
    """Return `module` with its BatchNorms replaced. done: {id of the original module: its replacement}."""
    if id(module) in done:
        return done[id(module)]
    done[id(module)] = module
    if isinstance(module, _BatchNorm):
        done[id(module)] = SwitchableBatchNorm2d(module, n)
    else:
        # named_children() leaves out a child's second name, which has to be replaced, too.
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = _replace(child, n, done)
    return done[id(module)]


class ResolutionSwitchable(nn.Module):
    """A network with private BatchNorm for each of `sizes`, and the ensemble's weights.

    sizes: sorted from the largest, whatever order they come in; a size finds its BatchNorm by value.
    alpha: (S,), the ensemble's weights before the softmax (section 3.3), 1 at the start.
    shared_norm: one BatchNorm for all sizes, which the paper compares with.

    Raises ValueError for sizes that are empty, repeated or not positive.
    """

    def __init__(self, network: nn.Module, sizes: Sequence[int], shared_norm: bool = False) -> None:
        super().__init__()
        if not sizes or len(set(sizes)) != len(sizes) or min(sizes) < 1:
            raise ValueError(f"sizes must be distinct and positive, not {list(sizes)}")
        self.sizes = tuple(sorted(sizes, reverse=True))
        self.shared_norm = shared_norm
        self.network = make_switchable(network, 1 if shared_norm else len(self.sizes))
        self.alpha = nn.Parameter(torch.ones(len(self.sizes)))
        self._norms = [m for m in self.network.modules() if isinstance(m, SwitchableBatchNorm2d)]
        self._quantizers = [m for m in self.network.modules() if isinstance(m, Quantizer)]
        self._quantized = quantized_layers(self.network)
        self._layers = castable_layers(self.network)

    def select(self, size: int) -> None:
        """Make `size` the resolution whose BatchNorm is applied. Raises ValueError if it has none."""
        if size not in self.sizes:
            known = " ".join(map(str, self.sizes))
            raise ValueError(f"no BatchNorm for size {size}; this network has {known}")
        index = self.sizes.index(size)
        # nn.Module.__setattr__ takes 1.4 us per layer: 74 us for a MobileNetV2, 5.5 us this way.
        for norm in self._norms:
            vars(norm)["active"] = 0 if self.shared_norm else index
        for quantizer in self._quantizers:
            vars(quantizer)["active"] = index

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load as nn.Module does, with this network's layer version numbers, which MNASNet needs.
        safetensors and `select_sizes` drop them; state dicts of this project always have the newest
        version.
        """
        state = OrderedDict(state_dict)
        state._metadata = self.state_dict()._metadata  # type: ignore[attr-defined]
        return super().load_state_dict(state, strict, assign)

    def norms_of(self, sizes: Sequence[int]) -> list[nn.Module]:
        """Return the private BatchNorms of these sizes; an empty list if all sizes share one."""
        if self.shared_norm:
            return []
        chosen = [self.sizes.index(size) for size in sizes]
        return [norm.by_resolution[index] for norm in self._norms for index in chosen]

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Return logits (N, classes) of images (N, 3, s, s), with the BatchNorm of `size`, by default s."""
        self.select(x.shape[-1] if size is None else size)
        if not self.training or torch.compiler.is_compiling():
            return cast(Tensor, self.network(x))
        with count_batches_together([norm.by_resolution[norm.active] for norm in self._norms]):
            return cast(Tensor, self.network(x))

    def forward_all(
        self, images: Sequence[Tensor], sizes: Sequence[int] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the logits (N, classes) of each size, of images (N, 3, s, s) of each, the largest first.

        sizes: those of `images`, if they are not all of the network's.

        The largest is first, so that its gradients, the last of the backward, are few when DDP's
        all-reduce of the shared weights begins.
        """
        sizes = sizes or self.sizes
        if torch.compiler.is_compiling():  # the compiler removes repeated casts itself
            with quantize_weights_once(self._quantized):
                return tuple(self(x, size) for x, size in zip(images, sizes, strict=True))
        logits = []
        with (
            quantize_weights_once(self._quantized),
            cast_weights_once(self._layers, len(sizes)) as begin,
        ):
            for index, (x, size) in enumerate(zip(images, sizes, strict=True)):
                begin(index)
                logits.append(self(x, size))
        return tuple(logits)

    @torch.no_grad()
    def complete_alpha(self) -> None:
        """Replace every alpha of -inf, which a size added after training has, by the mean of the others, so
        that the size takes part in the ensemble and its training.
        """
        known = self.alpha.isfinite()
        self.alpha.copy_(torch.where(known, self.alpha, self.alpha[known].mean()))

    def count_parameters(self) -> tuple[int, int]:
        """Return the numbers of shared and of private parameters (BatchNorm and alpha)."""
        everything = sum(p.numel() for p in self.parameters())
        private = sum(p.numel() for norm in self._norms for p in norm.parameters())
        private = 0 if self.shared_norm else private
        return everything - private - len(self.alpha), private + len(self.alpha)

    def ensemble_weights(self) -> Tensor:
        """Return softmax(alpha), (S,) float32."""
        return self.alpha.float().softmax(dim=0)


@contextmanager
def count_batches_together(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Add 1 to `num_batches_tracked` of all `norms` in one operation instead of one per layer. norms: the
    distinct layers of one training forward; a layer that is called twice counts one batch.
    """
    counting: list[Any] = [norm for norm in norms if _only_counts(norm)]
    for norm in counting:
        vars(norm)["num_batches_tracked"] = None  # shadows the buffer of that name
    try:
        yield
    finally:
        for norm in counting:
            del vars(norm)["num_batches_tracked"]
    if counting:
        torch._foreach_add_([norm.num_batches_tracked for norm in counting], 1)


def _only_counts(norm: Any) -> bool:
    """Return whether a training forward increments the counter without reading it."""
    return (
        isinstance(norm, _BatchNorm)
        and not isinstance(norm, nn.SyncBatchNorm)  # which requires its counter
        and norm.training
        and norm.momentum is not None
        and norm.num_batches_tracked is not None
    )

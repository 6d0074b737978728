"""LQ-Nets' learned quantizers (Zhang et al. 2018, section 3), shared by all resolutions of an RS-Net.

K bits are a basis v of K numbers; the 2^K levels are the sums of its entries under the codes of {-1, 1}^K
(weights) or {0, 1}^K (activations), and a value takes the level that is nearest. The basis follows the
values: every update moves it towards the least-squares solution for the codes that are there (`bases`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rsnet.config.model_config import BITS, FULL
from rsnet.models.quantization.encode import clipped_ste_backward, encode

_QUARTILE = 0.6745  # of a normal distribution: where the original's first levels come from


@torch.no_grad()
def level_table(basis: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds and levels of bases (C, K), (C, L) each, ascending, and the levels' codes, (C, L, K).

    codes: (L, K), of {-1, 1} or {0, 1}; the latter have 0 as their first level, whatever the basis.
    """
    levels, order = (basis[:, None] * codes).sum(2).sort(dim=1)
    thresholds = nn.functional.pad((levels[:, 1:] + levels[:, :-1]) / 2, (1, 0), value=-torch.inf)
    ranked = codes[order]
    # The original puts what lies below the first threshold at 0 after it has sorted; with a negative entry in
    # the basis the lowest level would be another.
    is_signed = codes[0, 0] < 0
    levels[:, 0] = torch.where(is_signed, levels[:, 0], 0)
    ranked[:, 0] = torch.where(is_signed, ranked[:, 0], 0)
    return thresholds, levels, ranked


def code_table(bits: int, lowest: float) -> Tensor:
    """The codes, (2^K, K), in the order of the binary numbers: 1 where a bit is set, else `lowest`."""
    ones = (torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1
    return torch.where(ones > 0, 1.0, lowest)


class Quantizer(nn.Module):
    """What both have: a basis and its moving average, debiased as TensorFlow does it.

    basis: (C, K), what is applied. total: (C, K), the sum of past solutions, weighted. rest: (), what the
    start would still weigh, 0.9 to the power of the updates; the basis is total / (1 - rest).
    statistics: of the forwards since the last update, by the number of their resolution (0 for weights, which
    are the same at all): (C, 2, L) float64, how many values took each of the L levels and their sum, see
    `encode`.
    active: the number of the resolution that is computed. counting: whether a forward in training adds to the
    statistics; one that only computes again what was not kept does not. held: what a weight's quantizer
    gives while all resolutions share it, see `quantized_once`.
    """

    basis: Tensor
    total: Tensor
    rest: Tensor
    codes: Tensor

    def __init__(self, bits: int, lowest: float, start: Tensor) -> None:
        super().__init__()
        if bits not in BITS:
            raise ValueError(f"{bits} bits: from {BITS[0]} to {BITS[-1]}, or {FULL} for none")
        self.bits = bits
        self.register_buffer("codes", code_table(bits, lowest), persistent=False)
        self.register_buffer("basis", start)
        self.register_buffer("total", torch.zeros_like(start))
        self.register_buffer("rest", torch.ones(()))
        self.active = 0
        self.counting = True
        self.held: Tensor | None = None
        self.statistics: dict[int, Tensor] = {}

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class WeightQuantizer(Quantizer):
    """Weights (C, ...) of a layer -> their levels, by a basis for each of the C output channels.

    The gradient is that of the identity. A parametrization of `weight`, see `quantize`.
    """

    def __init__(self, bits: int, channels: int, kernel: int) -> None:
        """kernel: height x width of the filter, which the start depends on, with the channels."""
        deviation = torch.full((channels, 1), (2 / (kernel * channels)) ** 0.5)
        super().__init__(bits, -1.0, _first_basis(deviation, bits))

    def forward(self, weight: Tensor) -> Tensor:
        if self.held is not None:
            return self.held
        counting = self.training and self.counting
        thresholds, levels, _ = level_table(self.basis, self.codes)
        quantized, counted = _StraightThrough.apply(weight, thresholds, levels, counting)
        if counted is not None:  # the same in every batch of an update
            self.statistics = {0: counted}
        return cast(Tensor, quantized)


class ActivationQuantizer(Quantizer):
    """Activations of any shape -> their levels, by one basis; what lies below the first threshold is 0.

    The gradient is that of min(x, the highest level). of_largest: follow the largest resolution alone.
    """

    def __init__(self, bits: int, of_largest: bool = False) -> None:
        start = 2 * _QUARTILE / (2**bits - 1) * 2.0 ** torch.arange(bits)
        super().__init__(bits, 0.0, start[None])
        self.of_largest = of_largest

    def forward(self, x: Tensor) -> Tensor:
        counting = self.training and self.counting and not (self.of_largest and self.active > 0)
        thresholds, levels, _ = level_table(self.basis, self.codes)
        quantized, counted = _Clipped.apply(x, thresholds, levels, counting)
        if counted is not None:
            before = self.statistics.get(self.active)
            self.statistics[self.active] = counted if before is None else before + counted
        return cast(Tensor, quantized)


def _first_basis(deviation: Tensor, bits: int) -> Tensor:
    """(C, 1) -> (C, K): for weights of a normal distribution of this deviation."""
    return _QUARTILE * deviation * 2.0 ** torch.arange(1 - bits, 1, device=deviation.device)


class ActivationPlace(nn.Identity):
    """Where a network quantizes its activations, if it is asked to."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, thresholds: Tensor, levels: Tensor, counting: bool
    ) -> tuple[Tensor, Tensor | None]:
        coded, counted = encode(x, thresholds, levels, counting)
        if counted is not None:
            ctx.mark_non_differentiable(counted)
        return coded, counted

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None, None


class _Clipped(_StraightThrough):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, thresholds: Tensor, levels: Tensor, counting: bool
    ) -> tuple[Tensor, Tensor | None]:
        # What comes before a quantizer keeps its output, x, itself if it is a ReLU.
        ctx.save_for_backward(x, levels[:, -1])
        return _StraightThrough.forward(ctx, x, thresholds, levels, counting)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return clipped_ste_backward(gradients[0], *ctx.saved_tensors), None, None, None


def quantize(
    network: nn.Module,
    qw: int,
    qa: int = FULL,
    skip: Sequence[str] | None = None,
    fixed_qa: bool = False,
) -> nn.Module:
    """Quantize the weights of the convolutions of `network` to `qw` bits, in place.

    qa: bits of the activations, at the `ActivationPlace`s of `network`. FULL, of either: none.
    skip: names of the layers that stay; None for the first convolution and the last layer.
    fixed_qa: the activations' bases follow the largest resolution alone.

    Raises ValueError for other numbers of bits, for activations of a network without places for their
    quantizers, for weights of one without convolutions, for names in `skip` that are no layers', for weights
    that are parametrized, and for a network that is quantized already.
    """
    if any(isinstance(m, Quantizer) for m in network.modules()):
        raise ValueError("the network is quantized already")
    # Also those that one module stands at: each layer has levels of its own.
    modules = list(network.named_modules(remove_duplicate=False))
    places = [n for n, m in modules if isinstance(m, ActivationPlace)]
    if qa != FULL and not places:
        raise ValueError(f"{type(network).__name__} has no places to quantize activations at")
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    convolutions = {n: m for n, m in layers if isinstance(m, nn.Conv2d)}
    if qw != FULL and not convolutions:
        raise ValueError(f"{type(network).__name__} has no convolution to quantize")
    if skip is None:
        skip = [*convolutions][:1] + [name for name, _ in layers[-1:]]
    if unknown := set(skip) - {name for name, _ in layers}:
        raise ValueError(f"no layers to skip: {' '.join(sorted(unknown))}")
    for name, layer in convolutions.items() if qw != FULL else ():
        if name not in skip:
            if parametrize.is_parametrized(layer, "weight"):
                raise ValueError(f"the weight of {name} is parametrized already")
            height, width = layer.kernel_size
            quantizer = WeightQuantizer(qw, layer.out_channels, height * width)
            # Unsafe is only that it is not tried out, which would count as a forward.
            parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    for name in places if qa != FULL else ():
        network.set_submodule(name, ActivationQuantizer(qa, fixed_qa))
    return network


@torch.no_grad()
def init_quantizers_from_weights(network: nn.Module) -> None:
    """Let the bases start from the deviation of the weights that are there, not from a random network's."""
    for layer in quantized_layers(network):
        weight, quantizer = weight_of(layer)
        deviation = weight.flatten(1).square().mean(1, keepdim=True).sqrt()
        quantizer.basis.copy_(_first_basis(deviation, quantizer.bits))


def full_precision_names(network: nn.Module) -> dict[str, str]:
    """{name in the state dict before quantization: name now} of all that is not a quantizer's."""
    quantizers = {f"{n}." for n, m in network.named_modules() if isinstance(m, Quantizer)}
    return {
        name.replace(".parametrizations.weight.original", ".weight"): name
        for name in network.state_dict()
        if not any(name.startswith(prefix) for prefix in quantizers)
    }


def quantized_layers(network: nn.Module) -> list[nn.Module]:
    """The layers whose weights are quantized."""
    return [m for m in network.modules() if parametrize.is_parametrized(m, "weight")]


def weight_of(layer: nn.Module) -> tuple[Tensor, WeightQuantizer]:
    """The weight that a quantized layer trains, and its quantizer."""
    chain: Any = layer.parametrizations.weight  # type: ignore[union-attr]
    return chain.original, chain[0]


@contextmanager
def quantized_once(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Quantize the weights of `layers` now, for all forwards within: five passes share one result."""
    quantizers = []
    try:
        for layer in layers:
            weight, quantizer = weight_of(layer)
            quantizer.held = quantizer(weight)
            quantizers.append(quantizer)
        yield
    finally:
        for quantizer in quantizers:
            quantizer.held = None

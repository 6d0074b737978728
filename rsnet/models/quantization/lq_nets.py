"""LQ-Nets' learned quantizers (Zhang et al. 2018, section 3), shared by all resolutions of an RS-Net.

K bits are a basis v of K numbers; the 2^K levels are the sums of its entries under the codes of {-1, 1}^K
(weights) or {0, 1}^K (activations), and a value takes the nearest level (`encode`). The basis follows the
values: `BasisUpdater` moves it, after every optimizer step, towards the least-squares solution for the codes
that the step's values had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rsnet.config.model_config import BITS, FULL
from rsnet.distributed import process_group as distributed
from rsnet.models.quantization.encode import clipped_ste_backward, code_table, encode, level_table

DECAY = 0.9  # of a basis' moving average
RIDGE = 1e-4  # pull towards the present basis, which decides where the codes that occur do not

_QUARTILE = 0.6745  # of a normal distribution: where the original's first levels come from


class Quantizer(nn.Module):
    """A basis and its moving average, debiased as TensorFlow does it.

    basis: (C, K), what is applied. total: (C, K), the weighted sum of past solutions. rest: (), the weight
    that the start would still have, 0.9 to the power of the updates; the basis is total / (1 - rest).
    statistics: of the forwards since the last update, by the index of their resolution (0 for weights, which
    are the same at all): (C, 2, L) float64, how many values took each of the L levels and their sum, see
    `encode`.
    active: the index of the resolution that is computed. counting: whether a forward in training adds to the
    statistics; the second forward of activation checkpointing does not. cached: the output of a weight's
    quantizer while all resolutions share it, see `quantize_weights_once`.
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
        self.cached: Tensor | None = None
        self.statistics: dict[int, Tensor] = {}

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class WeightQuantizer(Quantizer):
    """Rounds the weights (C, ...) of a layer to levels, by a basis for each of the C output channels.

    The gradient is that of the identity. It is a parametrization of `weight`, see `quantize`.
    """

    def __init__(self, bits: int, channels: int, kernel: int) -> None:
        """Start from the levels of Kaiming's fan-out initialisation.

        kernel: height x width of the filter.
        """
        deviation = torch.full((channels, 1), (2 / (kernel * channels)) ** 0.5)
        super().__init__(bits, -1.0, _first_basis(deviation, bits))

    def forward(self, weight: Tensor) -> Tensor:
        if self.cached is not None:
            return self.cached
        counting = self.training and self.counting
        thresholds, levels, _ = level_table(self.basis, self.codes)
        quantized, counted = _StraightThrough.apply(weight, thresholds, levels, counting)
        if counted is not None:  # the same in every batch of an update
            self.statistics[0] = counted
        return cast(Tensor, quantized)


class ActivationQuantizer(Quantizer):
    """Rounds activations of any shape to levels, by one basis; values below the first threshold become 0.

    The gradient is that of min(x, the highest level). largest_only: follow the largest resolution alone.
    """

    def __init__(self, bits: int, largest_only: bool = False) -> None:
        start = 2 * _QUARTILE / (2**bits - 1) * 2.0 ** torch.arange(bits)
        super().__init__(bits, 0.0, start[None])
        self.largest_only = largest_only

    def forward(self, x: Tensor) -> Tensor:
        counting = self.training and self.counting and not (self.largest_only and self.active > 0)
        thresholds, levels, _ = level_table(self.basis, self.codes)
        quantized, counted = _ClippedStraightThrough.apply(x, thresholds, levels, counting)
        if counted is not None:
            before = self.statistics.get(self.active)
            self.statistics[self.active] = counted if before is None else before + counted
        return cast(Tensor, quantized)


class QuantStub(nn.Identity):
    """A placeholder in a network that `quantize` replaces by an `ActivationQuantizer`."""


def quantize(
    network: nn.Module,
    qw: int,
    qa: int = FULL,
    *,
    fixed_qa: bool = False,
) -> nn.Module:
    """Quantize the weights of the convolutions of `network` to `qw` bits, in place.

    The first convolution and the last layer stay as they are.

    qa: bits of the activations, at the `QuantStub`s of `network`. FULL, of either: none.
    fixed_qa: the activations' bases follow the largest resolution alone.

    Raises ValueError for other numbers of bits, for activations of a network without `QuantStub`s, for
    weights of one without convolutions, for weights that are parametrized, and for a network that is
    quantized already.
    """
    if any(isinstance(m, Quantizer) for m in network.modules()):
        raise ValueError("the network is quantized already")
    # Also the second name of a stub that is used twice: each use has levels of its own.
    modules = list(network.named_modules(remove_duplicate=False))
    stubs = [n for n, m in modules if isinstance(m, QuantStub)]
    if qa != FULL and not stubs:
        raise ValueError(f"{type(network).__name__} has no places to quantize activations at")
    if qw != FULL:
        for layer in _layers_to_quantize(network):
            height, width = layer.kernel_size
            quantizer = WeightQuantizer(qw, layer.out_channels, height * width)
            # Unsafe is only that it is not tried out, which would count as a forward.
            parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    if qa != FULL:
        for name in stubs:
            network.set_submodule(name, ActivationQuantizer(qa, fixed_qa))
    return network


@torch.no_grad()
def init_quantizers_from_weights(network: nn.Module) -> None:
    """Start the bases from the deviation of the present weights, not from that of a new network's."""
    for layer in quantized_layers(network):
        weight, quantizer = weight_of(layer)
        deviation = weight.flatten(1).square().mean(1, keepdim=True).sqrt()
        quantizer.basis.copy_(_first_basis(deviation, quantizer.bits))


def full_precision_names(network: nn.Module) -> dict[str, str]:
    """Return {name in the state dict before quantization: name now} of all but the quantizers' buffers."""
    quantizers = {f"{n}." for n, m in network.named_modules() if isinstance(m, Quantizer)}
    return {
        name.replace(".parametrizations.weight.original", ".weight"): name
        for name in network.state_dict()
        if not any(name.startswith(prefix) for prefix in quantizers)
    }


def quantized_layers(network: nn.Module) -> list[nn.Module]:
    """Return the layers whose weights are quantized."""
    return [m for m in network.modules() if parametrize.is_parametrized(m, "weight")]


def weight_of(layer: nn.Module) -> tuple[Tensor, WeightQuantizer]:
    """Return the full-precision weight of a quantized layer, which is trained, and its quantizer."""
    chain: Any = layer.parametrizations.weight  # type: ignore[union-attr]
    return chain.original, chain[0]


@contextmanager
def quantize_weights_once(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Quantize the weights of `layers` now, for all forwards within: five passes share one result."""
    quantizers = []
    try:
        for layer in layers:
            weight, quantizer = weight_of(layer)
            quantizer.cached = quantizer(weight)
            quantizers.append(quantizer)
        yield
    finally:
        for quantizer in quantizers:
            quantizer.cached = None


class BasisUpdater:
    """Moves the bases of all quantizers of a network (Zhang et al. 2018, section 3.3).

    Every resolution of an update moves a basis once, the largest first, by the least-squares solution for
    its codes. The original, too, reads a basis for five forwards and then moves it five times, in no certain
    order, by what its first GPU saw. Here all batches of an update count, on all ranks, so that neither
    their number nor activation checkpointing changes anything. The weights are the same on all ranks.
    """

    def __init__(self, network: nn.Module, sizes: Sequence[int]) -> None:
        """Collect the quantizers of `network`. sizes: all that it has, the largest first."""
        self._sizes = tuple(sizes)
        self._weights = [m for m in network.modules() if isinstance(m, WeightQuantizer)]
        self._activations = [m for m in network.modules() if isinstance(m, ActivationQuantizer)]

    @torch.no_grad()
    def update(self, sizes: Sequence[int] | None) -> None:
        """Update the bases after the backward of an update's last batch, without synchronising the device.

        sizes: those that took part, None for all.
        """
        present = [i for i, size in enumerate(self._sizes) if sizes is None or size in sizes]
        if self._weights:
            statistics = torch.cat([q.statistics.pop(0) for q in self._weights])
            update_bases(self._weights, [statistics] * len(present))
        if self._activations:
            if self._activations[0].largest_only:
                present = present[:1]
            counted = [[q.statistics.pop(i) for q in self._activations] for i in present]
            everywhere = distributed.all_reduce_sum(torch.stack([torch.cat(c) for c in counted]))
            update_bases(self._activations, list(everywhere))


def update_bases(quantizers: Sequence[Quantizer], statistics: Sequence[Tensor]) -> None:
    """Move the bases once for each of `statistics`, (C, 2, L), whose rows are those of all quantizers."""
    rows = [len(q.basis) for q in quantizers]
    basis, total = (
        torch.cat([getattr(q, n) for q in quantizers]).double() for n in ("basis", "total")
    )
    _, _, codes = level_table(basis, quantizers[0].codes.double())
    rest = quantizers[0].rest.double()
    for counted in statistics:
        total = DECAY * total + (1 - DECAY) * solve_basis(basis, codes, counted)
        rest = DECAY * rest
        basis = total / (1 - rest)
    for name, values in (("basis", basis), ("total", total)):
        parts = torch.split(values.to(quantizers[0].basis.dtype), rows)
        torch._foreach_copy_([getattr(q, name) for q in quantizers], list(parts))
    for quantizer in quantizers:
        quantizer.rest.copy_(rest)


def solve_basis(basis: Tensor, codes: Tensor, statistics: Tensor) -> Tensor:
    """Return the least-squares basis (C, K) for values with these codes, drawn to `basis`.

    codes: (C, L, K), statistics: (C, 2, L), how many values have each code, and their sum.

    (B^T B + e I)^-1 (B^T x + e v). What no code determines stays exactly as it is, because empty levels
    count exactly 0.
    """
    number, total = statistics.unbind(1)
    weighted = codes * number[..., None]
    squares = codes.transpose(1, 2) @ weighted
    products = (codes * total[..., None]).sum(1)
    ridge = RIDGE * torch.eye(codes.shape[2], dtype=squares.dtype, device=squares.device)
    return cast(Tensor, torch.linalg.solve_ex(squares + ridge, products + RIDGE * basis)[0])


def _first_basis(deviation: Tensor, bits: int) -> Tensor:
    """Return the basis (C, K) for weights of a normal distribution with deviation (C, 1)."""
    return _QUARTILE * deviation * 2.0 ** torch.arange(1 - bits, 1, device=deviation.device)


def _layers_to_quantize(network: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions that `quantize` quantizes; raises as it does."""
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    convolutions = {n: m for n, m in layers if isinstance(m, nn.Conv2d)}
    if not convolutions:
        raise ValueError(f"{type(network).__name__} has no convolution to quantize")
    kept = {next(iter(convolutions)), layers[-1][0]}
    chosen = {name: m for name, m in convolutions.items() if name not in kept}
    for name, layer in chosen.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"the weight of {name} is parametrized already")
    return list(chosen.values())


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


class _ClippedStraightThrough(_StraightThrough):
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

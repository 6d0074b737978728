"""Quantized weights stored as K bits each, as releases do it, and restored bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rsnet.models.quantization.encode import code_table, level_indices, level_table
from rsnet.models.quantization.lq_nets import Quantizer, WeightQuantizer

CODES, BASIS = ".codes", ".basis"  # behind the name of a quantized weight

State = dict[str, Tensor]


def pack_state_dict(model: nn.Module) -> State:
    """Return the state dict, with WEIGHT.codes and WEIGHT.basis in place of every quantized weight.

    codes: uint8, (ceil(n K / 8),), K bits for each of the n weights, in the order of (C, in, h, w), the
    lowest first, without gaps. Bit k is the sign of entry k of its channel's basis, (C, K) float32; the sum
    of the signed entries is the weight. Activation quantizers keep their basis; moving averages, which only
    training needs, are left out.
    """
    state = dict(model.state_dict())
    for name, quantizer in model.named_modules():
        if not isinstance(quantizer, Quantizer):
            continue
        del state[f"{name}.total"], state[f"{name}.rest"]
        if isinstance(quantizer, WeightQuantizer):
            chain = name.removesuffix(".0")
            weight = chain.replace(".parametrizations.weight", ".weight")
            original = state.pop(f"{chain}.original")
            state[weight + CODES] = pack_bits(_numbers(original, quantizer), quantizer.bits)
            state[weight + BASIS] = state.pop(f"{name}.basis")
    return state


def unpack_state_dict(stored: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """Return what `pack_state_dict` packed as a state dict with the names and shapes of `like`.

    like: the state dict of the network with unquantized weights. The moving averages of the activations'
    quantizers and the counts of batches are those of a new network.
    """
    state = {}
    for name, expected in like.items():
        if name in stored:
            state[name] = stored[name]
        elif name + CODES in stored:
            state[name] = _weight(stored[name + CODES], stored[name + BASIS], expected.shape)
        else:  # needed only to continue the training
            start = torch.ones if name.endswith(".rest") else torch.zeros
            state[name] = start(expected.shape, dtype=expected.dtype)
    return state


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Pack n numbers below 2^bits, of any shape, into (ceil(n bits / 8),) uint8."""
    length = -(-numbers.numel() * bits // 8)
    if numbers.device.type == "meta":
        return torch.empty(length, dtype=torch.uint8, device="meta")
    digits = (numbers.reshape(-1, 1) >> torch.arange(bits)) & 1
    padded = nn.functional.pad(digits.flatten(), (0, 8 * length - digits.numel()))
    return (padded.reshape(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


def unpack_bits(stored: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_bits`: return (count,) int64."""
    digits = (stored[:, None].long() >> torch.arange(8)) & 1
    return (digits.flatten()[: count * bits].reshape(count, bits) << torch.arange(bits)).sum(1)


def _numbers(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """Return the number of each weight's code, (C, n)."""
    if weight.device.type == "meta":
        return weight
    thresholds, _, codes = level_table(quantizer.basis, quantizer.codes)
    powers = 2 ** torch.arange(quantizer.bits)
    numbers = ((codes > 0) * powers).sum(2)
    return numbers.gather(1, level_indices(weight.flatten(1), thresholds))


def _weight(stored: Tensor, basis: Tensor, shape: torch.Size) -> Tensor:
    """Return the quantized weight, (C, ...), of its packed codes and its basis, (C, K)."""
    bits = basis.shape[1]
    numbers = unpack_bits(stored, bits, shape.numel()).reshape(len(basis), -1)
    levels = (basis[:, None] * code_table(bits, -1.0)).sum(2)
    return levels.gather(1, numbers).reshape(shape)

"""Packed weights are K bits each, and unpack to the same bits."""

from __future__ import annotations

import copy

import pytest
import torch

from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.models.quantization.bit_packing import (
    pack_bits,
    pack_state_dict,
    unpack_bits,
    unpack_state_dict,
)
from rsnet.models.quantization.lq_nets import Quantizer, WeightQuantizer

SIZES = (48, 32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 1001])
def test_packed_numbers_are_a_row_of_binary_digits_without_gaps(bits, count):
    numbers = torch.randint(2**bits, (count,))
    stored = pack_bits(numbers, bits)
    digits = "".join(f"{n:0{bits}b}"[::-1] for n in numbers.tolist())
    expected = [int(digits[i : i + 8].ljust(8, "0")[::-1], 2) for i in range(0, len(digits), 8)]
    assert stored.dtype == torch.uint8
    assert stored.tolist() == expected
    assert unpack_bits(stored, bits, count).tolist() == numbers.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"qw": 1},
        {"qw": 2},
        {"qw": 3},
        {"qw": 8},
        {"mode": "preact", "qw": 2, "qa": 2},
        {"mode": "preact", "qa": 2},
    ],
)
def test_unpacked_networks_give_the_same_bits(options):
    model = create_model(
        ModelConfig("parallel_resnet10", 7, SIZES, width_mult=0.25, stem="small", **options)
    ).eval()
    for module in model.modules():
        if isinstance(
            module, WeightQuantizer
        ):  # as training leaves it, also with signs turned round
            module.basis.mul_(torch.randn_like(module.basis))
    stored = pack_state_dict(model)
    assert not any(name.endswith((".total", ".rest")) for name in stored)
    plain = create_model(
        ModelConfig(
            "parallel_resnet10", 7, SIZES, width_mult=0.25, stem="small", **options | {"qw": 32}
        )
    )
    plain.load_state_dict(unpack_state_dict(stored, plain.state_dict()))
    for quantizer in plain.modules():
        if isinstance(quantizer, Quantizer):  # a training would begin its averages anew
            assert (quantizer.rest, quantizer.total.any()) == (1, False)
    plain.eval()
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(3, 3, size, size)
            assert torch.equal(plain(x), model(x))


def test_packing_leaves_the_network_as_it_is_and_needs_no_weights_to_know_the_shapes():
    model = create_model(
        ModelConfig("parallel_resnet10", 7, SIZES, width_mult=0.25, mode="preact", qw=3, qa=2)
    )
    before = copy.deepcopy(model.state_dict())
    stored = pack_state_dict(model)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    on_meta = pack_state_dict(copy.deepcopy(model).to("meta"))
    assert {k: (v.shape, v.dtype) for k, v in on_meta.items()} == {
        k: (v.shape, v.dtype) for k, v in stored.items()
    }
    weight = model.network.layer1[0].residual.conv1.weight
    codes = stored["network.layer1.0.residual.conv1.weight.codes"]
    assert codes.numel() == -(-weight.numel() * 3 // 8)

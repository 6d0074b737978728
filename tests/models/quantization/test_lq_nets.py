"""The learned quantizers give the original's numbers, and follow plain descriptions of what they do."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from rsnet.models.quantization.encode import encode, level_table
from rsnet.models.quantization.encode_numba import TASK
from rsnet.models.quantization.lq_nets import (
    ActivationQuantizer,
    Quantizer,
    QuantStub,
    WeightQuantizer,
    full_precision_names,
    init_quantizers_from_weights,
    quantize,
    quantize_weights_once,
    quantized_layers,
    update_bases,
    weight_of,
)
from rsnet.models.resnet import scaled_resnet
from tests.helpers import parity
from tests.helpers.processes import holds_in_fork


def _network() -> nn.Module:
    return scaled_resnet("resnet10", num_classes=4, width_mult=0.25)


TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def _case(kind: str, bits: int) -> tuple[Quantizer, Tensor, dict[str, Tensor]]:
    """A quantizer, what the original's was given, and what the original's gave, laid out as ours."""
    numbers = {k: torch.tensor(v) for k, v in parity.numbers("lq")[f"{kind}/{bits}"].items()}
    if kind == "weight":
        quantizer: Quantizer = WeightQuantizer(bits, 5, 9)
        x = (parity.wave((3, 3, 4, 5), bits) * math.sqrt(2 / 45)).float().permute(3, 2, 0, 1)
        for name in ("y0", "grad0", "y3"):
            numbers[name] = numbers[name].reshape(3, 3, 4, 5).permute(3, 2, 0, 1)
    else:
        quantizer = ActivationQuantizer(bits)
        x = (1.5 * parity.wave((2, 6, 3, 3), 7 + bits).clamp(min=0)).float()
        for name in ("y0", "grad0", "y3"):
            numbers[name] = numbers[name].reshape(2, 6, 3, 3)
    numbers["init_basis"] = numbers["init_basis"].reshape(bits, -1).T
    numbers["basis_after"] = numbers["basis_after"].reshape(3, bits, -1).transpose(1, 2)
    return quantizer, x, numbers


@pytest.mark.parametrize("kind", ["weight", "activation"])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_outputs_gradients_and_three_updates_are_the_originals(kind, bits):
    quantizer, x, theirs = _case(kind, bits)
    torch.testing.assert_close(quantizer.basis, theirs["init_basis"], **TOLERANCE)
    x.requires_grad_()
    y = quantizer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, theirs["y0"], **TOLERANCE)
    torch.testing.assert_close(gradient, theirs["grad0"])
    for after in theirs["basis_after"]:
        quantizer(x)
        update_bases([quantizer], [quantizer.statistics.pop(0)])
        torch.testing.assert_close(quantizer.basis, after, **TOLERANCE)
    torch.testing.assert_close(quantizer(x), theirs["y3"], **TOLERANCE)


def _plain(x: Tensor, basis: Tensor, digits: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Each value's level and code, one value after the other, as Zhang et al. describe it."""
    codes = list(itertools.product(digits, repeat=len(basis)))
    level_table = sorted(
        (sum(b * v for b, v in zip(c, basis.tolist(), strict=True)), c) for c in codes
    )
    levels, chosen = [], []
    for value in x.flatten().tolist():
        rank = sum(value > (a[0] + b[0]) / 2 for a, b in itertools.pairwise(level_table))
        levels.append(level_table[rank][0])
        chosen.append(level_table[rank][1])
    return torch.tensor(levels).reshape(x.shape), torch.tensor(chosen, dtype=torch.float64)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_value_gets_the_level_of_its_interval_in_every_memory_layout(bits, layout):
    x = torch.randn(3, 5, 4, 4).abs().to(memory_format=layout)
    quantizer = ActivationQuantizer(bits).eval()
    y = quantizer(x)
    torch.testing.assert_close(y, _plain(x, quantizer.basis[0], (0, 1))[0])
    assert y.stride() == x.stride()
    weights = torch.randn(6, 5, 3, 3).to(memory_format=layout) / 5
    quantizer = WeightQuantizer(bits, 6, 9).eval()
    quantizer.basis.mul_(torch.linspace(0.5, 2, 6)[:, None])  # each channel has a table of its own
    y = quantizer(weights)
    for channel in range(6):
        expected = _plain(weights[channel], quantizer.basis[channel], (-1, 1))[0]
        torch.testing.assert_close(y[channel], expected)


@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        *((bits, (7, 3)) for bits in (1, 2, 4, 5)),
        *((bits, (64, 5, 40, 41)) for bits in (1, 4)),
        *((bits, (3, 2 * TASK + 1)) for bits in (2, 5)),  # rows in parts
    ],
)
def test_compiled_levels_and_counts_are_those_of_plain_operators(monkeypatch, bits, shape):
    x = torch.randn(shape)
    for rows in (1, shape[0]):
        basis = torch.rand(rows, bits)
        thresholds, levels, _ = level_table(basis, ActivationQuantizer(bits).codes)
        with monkeypatch.context() as patch:
            patch.setattr("rsnet.models.quantization.encode.COMPILED", ())
            coded, counted = encode(x, thresholds, levels, counting=True)
        compiled, also_counted = encode(x, thresholds, levels, counting=True)
        assert torch.equal(compiled, coded)
        assert torch.equal(also_counted[:, 0], counted[:, 0])
        torch.testing.assert_close(also_counted, counted, rtol=1e-5, atol=0.05)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 4, 4)])
def test_no_values_have_no_levels_and_count_nothing(shape):
    quantizer, x = ActivationQuantizer(2), torch.zeros(shape, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.shape == shape
    assert not quantizer.statistics[0].any()


def test_a_forked_process_quantizes_with_threads_of_its_own():
    quantizer, x = ActivationQuantizer(2), torch.rand(4 * TASK)  # that several threads share
    quantizer(x)
    assert holds_in_fork(lambda: quantizer(x).shape == x.shape)


def test_bfloat16_is_compared_and_summed_in_float32():
    x = (torch.randn(4, 8, 9, 9).abs() * 1.5).bfloat16()
    quantizer = ActivationQuantizer(2)
    y = quantizer(x)
    assert torch.equal(y, quantizer(x.float()).bfloat16())
    halves = quantizer.statistics.pop(0)  # of both calls
    quantizer(x.float())
    torch.testing.assert_close(halves, 2 * quantizer.statistics.pop(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_ends_above_the_highest_level_in_every_memory_layout(dtype):
    x = (torch.randn(4, 6, 5, 5) * 2).to(dtype)
    for given in (x, x.to(memory_format=torch.channels_last)):
        given = given.detach().requires_grad_()
        quantizer = ActivationQuantizer(2)
        gradient = torch.randn(4, 6, 5, 5).to(dtype)
        (found,) = torch.autograd.grad(quantizer(given), given, gradient)
        top = quantizer.basis.sum()
        assert torch.equal(found, torch.where(given.float() <= top, gradient, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the latter is not compiled
def test_a_value_at_a_threshold_takes_the_lower_level_and_one_at_the_highest_learns(dtype):
    quantizer = ActivationQuantizer(2).to(dtype)
    quantizer.basis.copy_(torch.tensor([[1.0, 2.0]]))
    x = torch.tensor([0.5, 1.5, 2.5, 3.0, 3.25], dtype=dtype, requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert y.tolist() == [0, 1, 2, 3, 3]
    assert x.grad.tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_an_update_is_the_least_squares_solution_drawn_to_the_basis(bits):
    weights = torch.randn(4, 5, 3, 3) / 5
    quantizer = WeightQuantizer(bits, 4, 9)
    before = quantizer.basis.double()
    quantizer(weights)
    update_bases([quantizer], [quantizer.statistics.pop(0)])
    for channel in range(4):
        _, codes = _plain(weights[channel], before[channel].float(), (-1, 1))
        x = weights[channel].flatten().double()
        squares = codes.T @ codes + 1e-4 * torch.eye(bits)
        expected = torch.linalg.solve(squares, codes.T @ x + 1e-4 * before[channel])
        torch.testing.assert_close(quantizer.basis[channel].double(), expected, **TOLERANCE)


def test_all_sizes_of_an_update_are_solved_for_the_same_codes_and_drawn_to_the_basis_as_it_moves():
    """Few values, so that the ridge of 1e-4 counts; the first size turns the order of the middle codes."""
    quantizer = WeightQuantizer(2, 1, 9)
    quantizer.basis.copy_(torch.tensor([[1.0, 1.05]]))
    # Of the levels -2.05, -0.05, 0.05, 2.05; as the codes are in their order.
    codes = torch.tensor([[-1, -1], [1, -1], [-1, 1], [1, 1]]).double()
    numbers = [torch.tensor([1e-4, 2e-4, 1e-4, 3e-4]), torch.tensor([2e-4, 0, 3e-4, 1e-4])]
    sums = [torch.tensor([-2e-4, 3e-4, -1e-4, 6e-4]), torch.tensor([-4e-4, 0, 2e-4, 2e-4])]
    v, total, rest = quantizer.basis[0].double(), torch.zeros(2).double(), 1.0
    for number, values in zip(numbers, sums, strict=True):
        squares = codes.T @ (codes * number.double()[:, None]) + 1e-4 * torch.eye(2)
        new = torch.linalg.solve(squares, codes.T @ values.double() + 1e-4 * v)
        total, rest = 0.9 * total + 0.1 * new, 0.9 * rest
        v = total / (1 - rest)
        assert v[0] > v[1]  # by the first solution; codes that followed it would be others
    update_bases(
        [quantizer], [torch.stack(s).double()[None] for s in zip(numbers, sums, strict=True)]
    )
    torch.testing.assert_close(quantizer.basis[0].double(), v, rtol=1e-6, atol=1e-7)


def test_levels_are_in_order_with_their_codes_whatever_the_signs_of_a_basis():
    basis = torch.tensor([[-1.0, 0.25], [0.5, -2.0]])
    thresholds, levels, codes = level_table(basis, WeightQuantizer(2, 2, 9).codes)
    assert levels.tolist() == [[-1.25, -0.75, 0.75, 1.25], [-2.5, -1.5, 1.5, 2.5]]
    assert thresholds.tolist() == [[-math.inf, -1, 0, 1], [-math.inf, -2, 0, 2]]
    assert codes[0].tolist() == [[1, -1], [1, 1], [-1, -1], [-1, 1]]
    assert codes[1].tolist() == [[-1, 1], [1, 1], [-1, -1], [1, -1]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    "values", [torch.zeros(1000), torch.ones(1000), torch.full((1000,), 1e-6), torch.rand(3)]
)
def test_bases_stay_finite_where_codes_never_occur(bits, values):
    activation, weight = ActivationQuantizer(bits), WeightQuantizer(bits, 1, 9)
    for _ in range(20):
        activation(values)
        weight(values[None])
        for quantizer in (activation, weight):
            update_bases([quantizer], [quantizer.statistics.pop(0)])
            assert quantizer.basis.isfinite().all()
            assert quantizer.basis.abs().max() < 10


def test_a_bit_that_no_value_has_keeps_its_entry():
    quantizer = ActivationQuantizer(2)
    low = torch.rand(100_000) * 0.6  # levels 0 and v_1 alone
    before = quantizer.basis.clone()
    quantizer(low)
    update_bases([quantizer], [quantizer.statistics.pop(0)])
    assert quantizer.basis[0, 1] == before[0, 1]
    assert quantizer.basis[0, 0] == pytest.approx(
        low[low > before[0, 0] / 2].mean().item(), rel=1e-4
    )


def test_more_bits_come_closer():
    deviation = (2 / (8 * 9)) ** 0.5
    weights = torch.randn(8, 64, 3, 3, generator=torch.Generator().manual_seed(0)) * deviation
    errors = []
    for bits in (1, 2, 3, 4, 8):
        quantizer = WeightQuantizer(bits, 8, 9)
        for _ in range(200):
            quantizer(weights)
            update_bases([quantizer], [quantizer.statistics.pop(0)])
        errors.append(((quantizer(weights) - weights) / deviation).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    # The best that 2 to 16 levels can do to a normal distribution (Max 1960, table 1).
    for error, best in zip(errors, (0.3634, 0.1175, 0.03454, 0.009497), strict=False):
        assert 0.95 * best < error < 1.4 * best
    assert errors[-1] < 2e-3


def test_quantizers_stay_in_float32_inside_autocast():
    quantizer = WeightQuantizer(2, 4, 9)
    weights = torch.randn(4, 3, 3, 3)
    outside = quantizer(weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(weights), outside)
        assert level_table(quantizer.basis, quantizer.codes)[1].dtype == torch.float32


def test_a_value_that_is_not_a_number_stays_one():
    x = torch.tensor([[0.3, torch.nan, 2.0]])
    for quantizer in (ActivationQuantizer(2), WeightQuantizer(2, 1, 9)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):  # the last is not compiled
            assert quantizer(x.to(dtype)).isnan().tolist() == [[False, True, False]]


def test_all_convolutions_but_the_first_are_quantized_and_no_linear_layer():
    network = quantize(_network(), 2)
    names = {n for n, m in network.named_modules() if m in set(quantized_layers(network))}
    convolutions = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert names == convolutions - {"conv1"}
    assert "layer2.0.downsample.0" in names
    headless = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)))  # its last layer is one
    assert quantized_layers(quantize(headless, 2)) == [headless[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "0 bits"), ((9,), "9 bits"), ((2, 2), "ResNet has no places to quantize activations")],
)
def test_what_cannot_be_quantized_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(_network(), *arguments)


def test_a_network_that_weights_cannot_be_quantized_of_is_refused():
    with pytest.raises(ValueError, match="Linear has no convolution to quantize"):
        quantize(nn.Linear(2, 2), 2)
    network = _network()
    nn.utils.parametrizations.weight_norm(network.layer1[0].conv1)
    with pytest.raises(ValueError, match=r"the weight of layer1\.0\.conv1 is parametrized already"):
        quantize(network, 2)


def test_a_stub_that_is_used_twice_becomes_two_quantizers():
    stub = QuantStub()
    network = quantize(nn.Sequential(stub, nn.Conv2d(3, 3, 1), stub, nn.Conv2d(3, 3, 1)), 2, 2)
    assert isinstance(network[0], ActivationQuantizer)
    assert isinstance(network[2], ActivationQuantizer)
    assert network[0] is not network[2]


def test_a_network_is_quantized_once():
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantize(_network(), 2), 2)


def test_five_forwards_share_one_quantized_weight():
    network = quantize(_network(), 2).eval()
    layers = quantized_layers(network)
    with quantize_weights_once(layers):
        held = [layer.weight for layer in layers]
        assert all(layer.weight is w for layer, w in zip(layers, held, strict=True))
    for layer, value in zip(layers, held, strict=True):
        assert layer.weight is not value
        assert torch.equal(layer.weight, value)


def test_names_of_full_precision_are_those_of_the_network_before():
    before = _network().state_dict()
    network = quantize(_network(), 2)
    assert set(full_precision_names(network)) == set(before)
    assert set(full_precision_names(network).values()) <= set(network.state_dict())


def test_bases_that_start_from_weights_fit_their_deviation():
    network = quantize(_network(), 3)
    layer = network.layer1[0].conv1
    weight, quantizer = weight_of(layer)
    with torch.no_grad():
        weight.copy_(torch.randn_like(weight) * 7)
    init_quantizers_from_weights(network)
    deviation = weight.flatten(1).square().mean(1).sqrt()
    expected = deviation[:, None] * 0.6745 * torch.tensor([1 / 4, 1 / 2, 1])
    torch.testing.assert_close(quantizer.basis, expected)

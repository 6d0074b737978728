"""Recomputation: the same bits, less memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from rsnet.config.model_config import ModelConfig
from rsnet.models.activation_checkpointing import convert_to_checkpointed
from rsnet.models.factory import create_model
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.objective import Objective

SIZES = (48, 32)


def _step(model, amp: bool, sizes=SIZES):
    """Gradients, buffers, and the bytes that the backward keeps of feature maps."""
    kept: dict[int, int] = {}

    def pack(tensor):
        if tensor.ndim == 4 and tensor.shape[0] == 4:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(4, 3, s, s, generator=generator) for s in sizes]
    images = tuple(x.contiguous(memory_format=torch.channels_last) for x in images)
    labels = torch.tensor([0, 1, 2, 0])
    objective = Objective(model.train(), "ens_topdown")
    torch.manual_seed(7)  # of dropout
    with warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        # The outputs of convolutions, which "norm" keeps, pass by these hooks: they are not in the bytes.
        warnings.filterwarnings("ignore", "A saved_tensors_hooks context", FutureWarning)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp, cache_enabled=False):
            terms = objective(images, labels)
        terms["total"].backward()
    state = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return state, sum(kept.values())


@pytest.mark.parametrize(
    ("arch", "amp", "what"),
    [
        ("parallel_resnet18", True, "norm"),
        ("parallel_resnet18", False, "blocks"),
        pytest.param("parallel_mobilenetv2", True, "norm", marks=pytest.mark.slow),
        pytest.param("parallel_mobilenetv2", True, "blocks", marks=pytest.mark.slow),
        # half a minute
        pytest.param("parallel_densenet121", False, "norm", marks=pytest.mark.slow),
    ],
)
def test_gradients_and_statistics_are_the_same_bits(arch, amp, what):
    torch.manual_seed(0)
    width_mult = {"parallel_densenet121": 1.0, "parallel_resnet18": 0.5}.get(arch, 0.25)
    config = ModelConfig(arch, 3, SIZES, width_mult=width_mult)
    plain = create_model(config).to(memory_format=torch.channels_last)
    again = copy.deepcopy(plain)
    assert convert_to_checkpointed(again.network, what) > 0
    assert list(again.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        expected, more = _step(plain, amp)
        found, less = _step(again, amp)
        assert found.keys() == expected.keys()
        different = [
            name for name, value in expected.items() if not torch.equal(found[name], value)
        ]
        assert different == []
    assert less < 0.6 * more  # the stem is in no block


class _Drop(nn.Module):
    """Draws as stochastic depth does, and in ways that no class shows."""

    def forward(self, x):
        x = torchvision.ops.stochastic_depth(x, 0.5, "row", self.training)
        return nn.functional.dropout(x, 0.25, self.training) + torch.rand_like(x)


def _block(squeeze: bool = False) -> nn.Module:
    # An activation in place overwrites what a convolution without BatchNorm gave.
    inner = [nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True)] if squeeze else [_Drop()]
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), *inner, nn.Conv2d(8, 8, 1))


class _Lists(nn.Module):
    """Writes into the list that it is given, as HRNet does, and over its input."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Hardswish(inplace=True), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        )

    def forward(self, x):
        x = x if isinstance(x, list) else [x]
        x[0] = self.branch(x[0])
        return x


class _Tiny(nn.Module):
    def __init__(self, norm: Callable[[nn.Module], nn.Module] = lambda network: network):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = norm(nn.Sequential(_block(), _block(squeeze=True), _Lists(), _Lists()))

    def forward(self, x):
        return self.blocks(self.stem(x))[0].mean((2, 3))


def _tiny(*arguments) -> ResolutionSwitchable:
    return ResolutionSwitchable(_Tiny(*arguments), SIZES)


@pytest.mark.parametrize("what", ["norm", "blocks"])
def test_random_numbers_are_drawn_once_by_whatever_layer_draws_them(what):
    torch.manual_seed(0)
    plain = _tiny()
    again = copy.deepcopy(plain)
    assert convert_to_checkpointed(again.network, what) == 4
    expected, _ = _step(plain, False)
    following = torch.rand(1)
    found, _ = _step(again, False)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(torch.rand(1), following)


@pytest.mark.slow  # 3 s each
@pytest.mark.parametrize("what", ["norm", "blocks"])
def test_stochastic_depth_of_torchvision_is_drawn_once(what):
    torch.manual_seed(0)
    plain = create_model(ModelConfig("parallel_efficientnet_b0", 3, (32, 24)))
    again = copy.deepcopy(plain)
    convert_to_checkpointed(again.network, what)
    expected, found = (_step(model, False, (32, 24))[0] for model in (plain, again))
    assert [name for name, v in expected.items() if not torch.equal(found[name], v)] == []


def test_the_counter_of_a_synchronised_batchnorm_counts_once():
    plain = _tiny(nn.SyncBatchNorm.convert_sync_batchnorm)
    convert_to_checkpointed(plain.network, "norm")
    found, _ = _step(plain, False)
    counts = [int(v) for name, v in found.items() if name.endswith("num_batches_tracked")]
    assert counts == [1] * 8


def test_it_evaluates_and_copies_as_before():
    torch.manual_seed(0)
    plain = create_model(ModelConfig("parallel_resnet10", 3, SIZES, width_mult=0.25))
    again = copy.deepcopy(plain)
    convert_to_checkpointed(again.network, "blocks")
    again = copy.deepcopy(again).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), plain.eval()(x))

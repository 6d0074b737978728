"""Weights cast once for all passes: autocast's own bits, in fewer operations."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from rsnet.config.model_config import ModelConfig
from rsnet.models import autocast, switchable
from rsnet.models.activation_checkpointing import convert_to_checkpointed
from rsnet.models.factory import create_model, synchronize_batchnorm
from rsnet.training.objective import Objective
from tests.helpers.operations import Operations

SIZES = (48, 40, 32)


@pytest.fixture
def by_themselves(monkeypatch):
    """Let every pass cast and count by itself."""

    @contextmanager
    def nothing(_layers, _passes):
        yield lambda _number: None

    def use():
        monkeypatch.setattr(switchable, "cast_weights_once", nothing)
        monkeypatch.setattr(switchable, "count_batches_together", lambda _norms: nullcontext())

    return use


def _train(model, sizes=None, dtype=torch.bfloat16, batches=2):
    """Some batches' gradients, and the buffers."""
    generator = torch.Generator().manual_seed(1)
    objective = Objective(model.train(), "ens_topdown")
    objective.zero_grad()
    for _ in range(batches):
        images = [torch.randn(3, 3, s, s, generator=generator) for s in SIZES]
        images = tuple(x.contiguous(memory_format=torch.channels_last) for x in images)
        with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
            terms = objective(images, torch.tensor([0, 1, 2]), sizes)
        terms["total"].backward()
    return {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())


def _operations(model):
    with Operations() as operations:
        _train(model)
    return operations.count


def _same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert torch.equal(found[name], value), name
            assert found[name].dtype == value.dtype


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("parallel_resnet10", {}),
        ("parallel_resnet10", {"sizes": (48, 32)}),
        ("parallel_resnet10", {"dtype": None}),
        ("parallel_resnet10", {"recompute": "blocks"}),
        ("parallel_resnet10", {"recompute": "norm"}),
        ("parallel_resnet10", {"norm": "shared"}),
        ("parallel_resnet10", {"qw": 2}),
        ("parallel_mobilenetv2", {}),
        pytest.param("parallel_mobilenetv2", {"dtype": torch.float16}, marks=pytest.mark.slow),
    ],
)
def test_gradients_and_buffers_are_the_same_bits(arch, options, by_themselves):
    torch.manual_seed(0)
    built = {name: options[name] for name in ("norm", "qw") if name in options}
    ours = create_model(ModelConfig(arch, 3, SIZES, width_mult=0.125, **built)).to(
        memory_format=torch.channels_last
    )
    if "recompute" in options:
        convert_to_checkpointed(ours.network, options["recompute"])
    theirs = copy.deepcopy(ours)
    run = {name: options[name] for name in ("sizes", "dtype") if name in options}
    found = _train(ours, **run)
    by_themselves()
    expected = _train(theirs, **run)
    _same(found, expected)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_a_weight_is_cast_once_and_a_norm_counts_once(by_themselves):
    model = create_model(ModelConfig("parallel_resnet10", 3, SIZES, width_mult=0.125))
    few = _operations(model)
    by_themselves()
    many = _operations(model)
    weights, norms, batches = 13, 12, 2
    assert many["_to_copy"] - few["_to_copy"] == 2 * 3 * weights * batches  # and gradients back
    sums = 2 * weights * batches  # of three gradients
    added = {name: many[name] - few[name] for name in ("add", "add_")}
    assert sum(added.values()) == 3 * norms * batches + sums
    assert few["_foreach_copy_"] < 25 * batches


def test_gradients_of_a_pass_are_summed_in_float32():
    """Of 1 and 2^-9, whose sum half precision does not hold."""
    layer = nn.Linear(1, 1, bias=False)
    with torch.autocast("cpu", torch.bfloat16), autocast.cast_weights_once([layer], 2) as begin:
        outputs = []
        for number, x in enumerate((1.0, 2.0**-9)):
            begin(number)
            assert layer.weight.dtype == torch.bfloat16
            outputs.append(layer(torch.tensor([[x]])))
    assert layer.weight is layer._parameters["weight"]
    torch.cat(outputs).sum().backward()
    assert layer.weight.grad.item() == 1 + 2.0**-9


def test_a_weight_that_no_pass_used_has_no_gradient_and_groups_are_bounded(monkeypatch):
    monkeypatch.setattr(autocast, "GROUP", 8)
    layers = [nn.Linear(2, 2, bias=False) for _ in range(5)]
    x = torch.ones(1, 2, requires_grad=True)
    layers[2].weight.requires_grad_(False)
    outputs = []
    with torch.autocast("cpu", torch.bfloat16), autocast.cast_weights_once(layers, 2) as begin:
        for number, used in enumerate(([0, 1, 2], [1, 4])):
            begin(number)
            assert layers[2].weight.dtype == torch.float32
            outputs += [layers[i](x) for i in used]
    torch.cat(outputs).sum().backward()
    assert [layer.weight.grad is not None for layer in layers] == [True, True, False, False, True]
    assert torch.equal(layers[1].weight.grad, torch.full((2, 2), 2.0))


def test_gradients_of_late_layers_come_before_the_end_of_the_backward(monkeypatch):
    """DDP sends them while the rest of the backward runs."""
    monkeypatch.setattr(autocast, "GROUP", 20_000)
    model = create_model(ModelConfig("parallel_resnet10", 3, SIZES, width_mult=0.125)).train()
    arrived = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _p, name=name: arrived.append(name))
    _train(model, batches=1)
    place = arrived.index
    assert place("network.fc.weight") < place("network.bn1.by_resolution.0.weight")
    middle = place("network.layer3.0.bn1.by_resolution.0.weight")
    assert place("network.layer4.0.conv1.weight") < middle < place("network.conv1.weight")


def test_without_a_weight_that_is_trained_nothing_is_cast():
    layer = nn.Linear(2, 2).requires_grad_(False)
    double = nn.Linear(2, 2).double()
    for layers in ([], [layer], [double]):
        with torch.autocast("cpu", torch.bfloat16), autocast.cast_weights_once(layers, 1) as begin:
            begin(0)
            assert not any("weight" in vars(m) for m in layers)


def test_a_failed_pass_leaves_the_layers_as_they_were():
    model = create_model(ModelConfig("parallel_resnet10", 3, SIZES, width_mult=0.125)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16):
        model.forward_all([torch.zeros(2, 4, s, s) for s in SIZES])
    assert not any("weight" in vars(m) or "num_batches_tracked" in vars(m) for m in model.modules())
    _same(model.state_dict(), before)


def test_layers_of_other_libraries_cast_their_own_weight():
    timm = pytest.importorskip("timm", reason="its convolutions that standardise their weight")
    network = nn.Sequential(timm.layers.ScaledStdConv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    assert autocast.castable_layers(network) == [network[1]]


def test_a_synchronised_norm_counts_itself():
    model = create_model(ModelConfig("parallel_resnet10", 3, SIZES, width_mult=0.125)).train()
    synchronize_batchnorm(model, "parallel_resnet10")
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    with switchable.count_batches_together(norms):
        assert all(norm.num_batches_tracked is not None for norm in norms)
    assert {int(norm.num_batches_tracked) for norm in norms} == {0}

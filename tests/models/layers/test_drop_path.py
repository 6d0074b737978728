"""`--drop-path`: rates of the libraries, blocks against the plain ones, and what it leaves untouched."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth

from pipelines.utils.errors import UsageError
from rsnet.config.model_config import ModelConfig
from rsnet.models.activation_checkpointing import convert_to_checkpointed
from rsnet.models.factory import create_model
from rsnet.models.layers.drop_path import DropPath
from rsnet.models.layers.fused_batchnorm import FusedBatchNorm2d, convert_to_fused_batchnorm
from rsnet.models.switchable import ResolutionSwitchable

RATE = 0.3
SIZES = (32, 24)
# Arch, options, and the last layer of a residual branch, by its name in the plain network.
NETWORKS = [
    ("parallel_resnet10", {"width_mult": 0.125}, r"layer\d\.\d\.bn2"),
    ("parallel_resnet50", {"width_mult": 0.125}, r"layer\d\.\d\.bn3"),
    ("parallel_mobilenetv2", {"width_mult": 0.25}, r"features\.\d+\.conv\.3"),
    ("parallel_resnet10", {"mode": "preact", "width_mult": 0.125}, r"layer\d\.\d\.residual\.bn"),
]


def _model(arch: str, drop_path: float | None, **more) -> ResolutionSwitchable:
    torch.manual_seed(0)
    config = ModelConfig(arch, 5, SIZES, **more)
    return create_model(config, drop_path=drop_path).to(memory_format=torch.channels_last)


def _drop_paths(model: nn.Module) -> list[DropPath]:
    return [m for m in model.modules() if isinstance(m, DropPath)]


def _rates(network: nn.Module) -> list[float]:
    """Of a library's network, in the blocks with a shortcut."""
    found = []
    for block in network.modules():
        layers = (
            m for m in block.children() if isinstance(m, StochasticDepth | timm.layers.DropPath)
        )
        if getattr(block, "has_skip", getattr(block, "use_res_connect", True)):
            found += [m.p if isinstance(m, StochasticDepth) else m.drop_prob for m in layers]
    return [rate for rate in found if rate]


@pytest.mark.parametrize(
    ("arch", "reference"),
    [
        ("parallel_resnet18", lambda: timm.create_model("resnet18", drop_path_rate=RATE)),
        ("parallel_mobilenetv2", lambda: timm.create_model("mobilenetv2_100", drop_path_rate=RATE)),
        ("parallel_timm/test_resnet", lambda: timm.create_model("test_resnet", drop_path_rate=RATE)),
        ("parallel_efficientnet_b0", lambda: torchvision.models.efficientnet_b0(stochastic_depth_prob=RATE)),
    ],
)  # fmt: skip
def test_rates_grow_with_depth_as_the_librarys(arch, reference):
    """torchvision has no rates for its ResNets and MobileNetV2: these are timm's."""
    rates = _rates(reference())
    model = _model(arch, RATE)
    found = [m.rate for m in _drop_paths(model) if m.rate]
    if "efficientnet" in arch:
        found = [
            b.stochastic_depth.rate for b in model.modules() if getattr(b, "use_res_connect", False)
        ]
        found = [rate for rate in found if rate]
    assert found == pytest.approx(rates)
    assert rates == sorted(rates)


def _draw(model: nn.Module, samples: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    factors = []
    for layer in _drop_paths(model):
        noise = torch.empty(samples).bernoulli_(1 - layer.rate, generator=generator)
        layer.factors = noise / (1 - layer.rate)
        factors.append(layer.factors)
    return factors


def _step(model: ResolutionSwitchable, images: list[torch.Tensor]):
    model.train().zero_grad()
    logits = model.forward_all(images)
    sum(z.square().mean() for z in logits).backward()
    return [*logits, *(p.grad for p in model.parameters() if p.grad is not None)]


def _images(samples: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = (torch.randn(samples, 3, s, s, generator=generator) for s in SIZES)
    return [x.contiguous(memory_format=torch.channels_last) for x in images]


@pytest.mark.parametrize(("arch", "more", "last"), NETWORKS)
def test_a_step_is_that_of_the_plain_network_with_its_branches_multiplied(arch, more, last):
    model, plain = _model(arch, RATE, **more), _model(arch, None, **more)
    states = model.state_dict(), plain.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    factors = _draw(model, 4)
    branches = [m for n, m in plain.network.named_modules() if re.fullmatch(last, n)]
    if "mobilenet" in arch:  # those with a shortcut; the first block's rate is 0
        branches = [b.conv[3] for b in plain.network.features[2:-1] if b.use_res_connect]
    else:
        branches = branches[1:]
    model.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(model(_images()[0]), plain(_images()[0]))
    for branch, factor in zip(branches, factors, strict=True):
        branch.register_forward_hook(lambda _m, _x, y, f=factor: y * f.view(-1, 1, 1, 1))
    for a, b in zip(_step(model, _images()), _step(plain, _images()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(4, 8, 5, 5), (12, 7, 8)])
def test_a_sample_is_dropped_in_all_its_rows_and_the_layout_stays(shape):
    """Networks that look at patches have several rows of a sample, one behind the other."""
    layer = DropPath(0.5)
    layer.factors = torch.tensor([0.0, 2.0, 2.0, 0.0])
    x = torch.randn(shape, dtype=torch.bfloat16)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    found = layer(x)
    for i, factor in enumerate(layer.factors):
        rows = slice(i * len(x) // 4, (i + 1) * len(x) // 4)
        assert torch.equal(found[rows], factor.item() * x[rows])
    assert (found.stride(), found.dtype) == (x.stride(), x.dtype)
    assert layer.eval()(x) is x


def test_without_draws_it_is_torchvisions_own():
    layer, reference, x = DropPath(0.4), StochasticDepth(0.4, "row"), torch.randn(64, 3, 2, 2)
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    assert torch.equal(found, reference(x))


@pytest.mark.parametrize(
    ("arch", "what"),
    [("resnet10", "blocks"), ("resnet10", "norm"), ("resnet50", "fused"), ("resnet10", "fused")],
)
def test_recomputed_and_fused_blocks_drop_the_same(arch, what):
    """Of a fused block, all but its last BatchNorm; the sum behind that has the factors in it."""
    model = _model(f"parallel_{arch}", RATE, width_mult=0.125)
    other = copy.deepcopy(model)
    for m in (model, other):
        _draw(m, 4)
    if what == "fused":
        norms = convert_to_fused_batchnorm(other.network)
        assert sum(isinstance(m, FusedBatchNorm2d) for m in other.modules()) == 2 * len(norms)
        assert {n for n in norms if "layer4" in n} == {
            "resnet10": {"layer4.0.bn1"},
            "resnet50": {f"layer4.{i}.bn{j}" for i in range(3) for j in (1, 2)},
        }[arch]
    else:
        convert_to_checkpointed(other.network, what)
    for a, b in zip(_step(model, _images()), _step(other, _images()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_compiled_code_reads_the_draws_of_each_step_and_is_not_compiled_again():
    model = _model("parallel_resnet10", 0.5, width_mult=0.125)
    compiled = copy.deepcopy(model)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    network = torch.compile(compiled.network, backend=backend, dynamic=False)
    for m in (model, compiled):
        _draw(m, 4)
        m.train().select(32)
    for _ in range(2):
        x = _images()[0]
        assert torch.equal(network(x), model.network(x))
        for a, b in zip(_drop_paths(model), _drop_paths(compiled), strict=True):
            a.factors.copy_(a.factors.roll(1))
            b.factors.copy_(a.factors)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("arch", ["parallel_shufflenet_v2_x0_5", "parallel_timm/dla46_c"])
def test_a_network_without_branches_that_can_be_dropped_is_refused_in_a_line(arch):
    with pytest.raises(
        UsageError,
        match=f"^--drop-path 0.1: {arch} has no residual branches that can be dropped; leave it out$",
    ):
        create_model(ModelConfig(arch, 5, (64,)), drop_path=0.1)

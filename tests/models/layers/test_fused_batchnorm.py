"""BatchNorm fused with what follows: PyTorch's numbers, and the network's names.

The wiring (gradients, statistics, blocks, shapes) is tested with the kernels' formulas in PyTorch, the
kernels in Triton's interpreter, in a process of its own, and by a compilation for a GPU.
"""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipelines.utils.errors import UsageError
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import resolve
from rsnet.config.train_config import TrainConfig
from rsnet.models.factory import create_model, fuse_batchnorm
from rsnet.models.fold import fold_batchnorm
from rsnet.models.layers import fused_batchnorm
from rsnet.models.layers.fused_batchnorm import (
    AddActivation,
    FusedBatchNorm2d,
    batch_norm_act,
    batch_norm_statistics,
)
from rsnet.models.shapes import gmacs
from rsnet.models.switchable import make_switchable
from rsnet.training.trainer import require_trainable
from tests.helpers.triton import compile_for_h100

SIZES = (32, 16)
# Read when Triton is imported, which other tests do without.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="needs TRITON_INTERPRET=1 in a process of its own"
)


def _statistics(x, running_mean, running_var, momentum, eps):
    rows = x.double().movedim(1, -1).reshape(-1, x.shape[1])
    var, mean = torch.var_mean(rows, 0, correction=0)
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(rows.var(0).to(running_var.dtype), momentum)
    return mean.to(running_mean.dtype), (var + eps).rsqrt().to(running_mean.dtype)


def _apply(x, norm, residual, act):
    weight, bias, mean, rstd = (t[:, None, None].double() for t in norm)
    y = (x - mean) * (rstd * weight) + bias + (0 if residual is None else residual)
    return {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6}[act](y).to(x.dtype)


def _gradients(grad_y, x, y, norm, act):
    weight, bias, mean, rstd = (t[:, None, None].double() for t in norm)
    seen = (x - mean) * (rstd * weight) + bias if y is None else y
    low, high = {"none": (-torch.inf, torch.inf), "relu": (0, torch.inf), "relu6": (0, 6)}[act]
    grad_y = torch.where((seen > low) & (seen < high), grad_y.double(), 0.0)
    normalized = (x - mean) * rstd
    grad_bias, grad_weight = grad_y.sum((0, 2, 3)), (grad_y * normalized).sum((0, 2, 3))
    rows = x.numel() / x.shape[1]
    grad_x = grad_y - (grad_bias[:, None, None] + normalized * grad_weight[:, None, None]) / rows
    grad_x = (grad_x * rstd * weight).to(x.dtype).contiguous(memory_format=torch.channels_last)
    found = [grad_x, grad_weight.to(norm[0].dtype), grad_bias.to(norm[0].dtype)]
    return found if y is None else [*found, grad_y.to(x.dtype)]


@pytest.fixture
def formulas(monkeypatch):
    """Put PyTorch in the kernels' place, which takes float64, too."""
    kernels = SimpleNamespace(statistics=_statistics, apply=_apply, gradients=_gradients)
    monkeypatch.setattr(fused_batchnorm, "_kernels", lambda: kernels)
    monkeypatch.setattr(fused_batchnorm, "_has_kernels", lambda _x: True)
    monkeypatch.setattr(fused_batchnorm, "DTYPES", (torch.float32, torch.float64))


def _values(shape, dtype=torch.float32, spread=1.0, mean=0.0):
    values = (torch.randn(shape) * spread + mean).to(dtype)
    return values.contiguous(memory_format=torch.channels_last).requires_grad_()


def _compare(shape, dtype, act, adds, mean=0.0):
    """Compare a fused layer with PyTorch's in float64: output, all gradients, statistics."""
    channels = shape[1]
    exact = nn.BatchNorm2d(channels).double()
    nn.init.normal_(exact.weight)
    nn.init.normal_(exact.bias)
    nn.init.normal_(exact.running_mean)
    layer = FusedBatchNorm2d(channels)
    layer.load_state_dict(exact.state_dict())
    layer.act = AddActivation(act)
    x = _values(shape, dtype, 3.0, mean)
    residual = _values(shape, dtype) if adds else None
    x64, residual64 = (
        None if t is None else t.detach().double().requires_grad_() for t in (x, residual)
    )
    before = exact(x64) + (residual64 if adds else 0)
    wanted = AddActivation(act)(before)
    # At a bound of the activation, rounding decides whether a gradient passes.
    edges = [(before - edge).abs() < 1e-4 + edge * torch.finfo(dtype).eps for edge in (0, 6)]
    gradient = torch.randn(shape).to(dtype).masked_fill(edges[0] | edges[1], 0.0)
    wanted.backward(gradient.double())
    y = layer(x, residual)
    y.backward(gradient)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    tolerance = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    pairs = [(y, wanted, tolerance), (x.grad, x64.grad, tolerance)]
    if adds:
        pairs.append((residual.grad, residual64.grad, tolerance))
    for name in ("weight", "bias"):
        pairs.append((getattr(layer, name).grad, getattr(exact, name).grad, 1e-5))
    for name in ("running_mean", "running_var"):
        pairs.append((getattr(layer, name), getattr(exact, name), 1e-5))
    for found, expected, allowed in pairs:
        assert found.dtype == (dtype if allowed == tolerance else torch.float32)
        error = (found.detach().double() - expected).abs().max() / expected.abs().max()
        assert error < allowed
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
def test_gradients_and_statistics_are_pytorchs(act, adds):
    _compare((3, 5, 4, 4), torch.float32, act, adds)


RULES = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.usefixtures("formulas")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize(
    "rules", [RULES, pytest.param(("test_aot_dispatch_static",), marks=pytest.mark.slow)]
)
def test_the_operations_keep_pytorchs_rules_for_operations(rules):
    """Schemas, fake tensors, autograd, and what torch.compile makes of them."""
    x, residual = _values((3, 5, 4, 4)), _values((3, 5, 4, 4))
    weight, bias = (torch.randn(5, requires_grad=True) for _ in range(2))
    mean, rstd = torch.randn(5), torch.rand(5)
    given = (x.detach(), mean, rstd, 0.1, 1e-5)
    torch.library.opcheck(batch_norm_statistics, given, test_utils=rules)
    for added in (None, residual):
        given = (x, weight, bias, mean, rstd, added, "relu")
        torch.library.opcheck(batch_norm_act, given, test_utils=rules)


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize(
    ("arch", "count", "alone"),
    [
        ("parallel_resnet18", "17 of 20", "layer2.0.downsample.1, layer3.0.downsample.1, layer4.0.dow"),
        pytest.param(
            "parallel_resnet50", "49 of 53", "layer1.0.downsample.1, layer2.0.downsample.1, layer3.0.dow",
            marks=pytest.mark.slow,
        ),
        ("parallel_mobilenetv2", "46 of 52", "features.2.conv.3, features.4.conv.3, features.7.conv.3"),
    ],
)  # fmt: skip
def test_a_training_step_of_a_fused_network_is_the_networks_own(arch, count, alone):
    """With its names, its counters, its evaluation, its copies, and BatchNorm folded into convolutions."""
    torch.manual_seed(0)
    model = create_model(ModelConfig(arch, 5, SIZES, width_mult=0.25)).double()
    model = model.to(memory_format=torch.channels_last)
    fused = copy.deepcopy(model)
    line = fuse_batchnorm(fused, arch)
    assert line.startswith(f"--fused-bn: {count} BatchNorm layers are fused, on their own: {alone}")
    images = [torch.randn(8, 3, s, s, dtype=torch.float64) for s in SIZES]
    images = [x.contiguous(memory_format=torch.channels_last) for x in images]
    for network in (model, fused):
        sum(z.square().sum() for z in network.forward_all(images)).backward()
    expected = model.state_dict()
    assert fused.state_dict().keys() == expected.keys()
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=name)
    for (name, ours), theirs in zip(fused.named_parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8, msg=name)
    fused.load_state_dict(expected)
    again = copy.deepcopy(fused).eval()
    with torch.no_grad():
        wanted = model.eval()(images[1])
        torch.testing.assert_close(again(images[1]), wanted)
        folded = fold_batchnorm(fused, SIZES[1])
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        torch.testing.assert_close(folded(images[1]), wanted)
    assert gmacs(fused, 32) == gmacs(model, 32)


@pytest.mark.usefixtures("formulas")
def test_the_kernels_are_launched_on_the_device_of_their_values(monkeypatch):
    """Triton launches on the current device, whatever the tensors are on."""
    current, launched = [], []

    @contextmanager
    def device_of(values):
        current.append(values)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kernels = vars(fused_batchnorm._kernels())
    for name, function in list(kernels.items()):

        def launch(*given, name=name, function=function):
            launched.append((name, len(current)))
            return function(*given)

        monkeypatch.setitem(kernels, name, launch)
    layer = FusedBatchNorm2d(8)
    layer.act = AddActivation("relu")
    layer(_values((2, 8, 3, 3))).sum().backward()
    assert launched == [("statistics", 1), ("apply", 1), ("gradients", 1)]


@pytest.mark.usefixtures("formulas")
def test_what_the_kernels_do_not_take_is_computed_by_pytorch(monkeypatch):
    """Another memory layout or precision; and one value per channel, of which it says so."""
    monkeypatch.setattr(fused_batchnorm, "batch_norm_act", None)  # would fail
    layer = FusedBatchNorm2d(4)
    layer.act = AddActivation("relu")
    plain = nn.BatchNorm2d(4)
    contiguous = torch.randn(2, 4, 3, 3)
    half = contiguous.bfloat16().contiguous(memory_format=torch.channels_last)
    for x in (contiguous, half):  # the formulas' precisions are others than the kernels'
        assert torch.equal(layer(x, x), F.relu(plain(x) + x))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer.float()(torch.randn(1, 4, 1, 1))


def test_batchnorms_that_compute_otherwise_are_left_alone():
    """One that is used twice, one without parameters of its own, one whose average needs its counter."""
    twice = nn.BatchNorm2d(8)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), twice, nn.ReLU(), nn.Conv2d(8, 8, 1), twice, nn.ReLU(),
        nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.BatchNorm2d(8, momentum=None), nn.ReLU(),
        nn.BatchNorm2d(8), nn.ReLU6(), nn.BatchNorm2d(8), nn.Hardswish(),
    )  # fmt: skip
    network = make_switchable(network, 2)
    assert fused_batchnorm.convert_to_fused_batchnorm(network) == ["10"]
    assert isinstance(network[11], nn.Identity)
    assert network[10].by_resolution[0].act.kind == "relu6"


def test_a_network_without_any_that_can_be_fused_is_one_line():
    model = create_model(ModelConfig("parallel_googlenet", 5, (64, 32)))
    with pytest.raises(
        UsageError, match="--fused-bn: parallel_googlenet has no BatchNorm that can"
    ):
        fuse_batchnorm(model, "parallel_googlenet")


@pytest.mark.parametrize(
    ("given", "device", "line"),
    [
        ({}, "cpu", "--fused-bn: its kernels are for GPUs; leave it out"),
        ({"recompute": "norm"}, "cuda", "--fused-bn and --recompute: choose one"),
        ({"sync_bn": True}, "cuda", "--fused-bn and --sync-bn: choose one"),
        ({}, "cuda", "--fused-bn: torch came without Triton"),
    ],
)
def test_where_it_cannot_be_there_is_one_line(given, device, line, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)

    def check():
        config = TrainConfig(data=tmp_path, fused_bn=True, **given)
        config = resolve(config, world_size=1, device_type=device, has_bf16=True)
        require_trainable(config, torch.device(device))

    with pytest.raises(UsageError, match=line):
        check()


@pytest.mark.slow  # a process that imports torch
@pytest.mark.skipif(INTERPRETED, reason="this is the process of its own")
def test_the_interpreters_tests_pass_in_a_process_of_their_own():
    pytest.importorskip("triton", reason="torch came without Triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "kernels",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@needs_interpreter
@pytest.mark.parametrize(
    ("shape", "dtype", "act", "adds"),
    [
        ((5, 1, 1, 1), torch.float32, "relu", False),  # one channel, five values
        ((3, 5, 4, 4), torch.float32, "relu6", True),
        ((3, 5, 4, 4), torch.bfloat16, "none", True),
        ((2, 130, 3, 3), torch.bfloat16, "relu", True),  # a second block of channels
        ((2, 130, 3, 3), torch.float16, "relu", False),
        ((3, 24, 7, 7), torch.bfloat16, "relu6", False),
        ((40, 8, 16, 16), torch.bfloat16, "relu", False),  # many first-stage programs
    ],
)
def test_the_kernels_have_pytorchs_numbers(shape, dtype, act, adds):
    torch.manual_seed(0)
    _compare(shape, dtype, act, adds)


@needs_interpreter
def test_the_kernels_statistics_are_exact_far_from_zero_and_over_many_programs(monkeypatch):
    """A sum of squares in float32 would lose the variance of values around 1000, and be 10 % wrong."""
    torch.manual_seed(0)
    kernels = importlib.import_module("rsnet.models.layers.fused_batchnorm_triton")
    monkeypatch.setattr(kernels, "TILE", 64)  # so that few values are many tiles
    monkeypatch.setattr(kernels, "PROGRAMS", 40)
    x = torch.randn(7, 3, 11, 9).mul(0.5).add(1000.0).contiguous(memory_format=torch.channels_last)
    running = torch.zeros(3), torch.ones(3)
    mean, rstd = kernels.statistics(x, *running, 1.0, 1e-12)
    rows = x.double().movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(rstd.double(), rows.var(0, correction=0).rsqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(running[1].double(), rows.var(0), rtol=1e-4, atol=0)


@needs_interpreter
def test_the_kernels_pass_nan_on_and_take_other_layouts():
    """As a loss that is not finite has to be seen; and gradients come as they come."""
    kernels = importlib.import_module("rsnet.models.layers.fused_batchnorm_triton")
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    norm = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3)
    for act in ("none", "relu", "relu6"):
        residual = torch.randn(2, 3, 4, 4)
        residual[0, 0, 0, 0] = torch.nan
        y = kernels.apply(x, norm, residual, act)
        torch.testing.assert_close(y, AddActivation(act)(x, residual), equal_nan=True)
    grad_y = torch.ones(2, 3, 1, 1).expand(2, 3, 4, 4)
    found = kernels.gradients(grad_y, x, None, norm, "relu")
    torch.testing.assert_close(found[2], (x > 0).sum((0, 2, 3)).float())


@pytest.mark.slow  # compilations
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("adds", [False, True])
def test_every_kernel_compiles_for_a_gpu_without_one(adds, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="torch came without Triton")
    module = importlib.import_module("rsnet.models.layers.fused_batchnorm_triton")
    types = dict.fromkeys(("x", "y", "residual", "grad_y", "grad_x", "grad_residual"), "*bf16")
    types |= dict.fromkeys(("rows", "channels", "part", "splits"), "i32")
    types |= {"momentum": "fp32", "eps": "fp32"}
    constants = {"ROWS": 32, "COLUMNS": 32, "ACTIVATION": 2}
    constants |= dict.fromkeys(("ADDS", "READS_Y", "WRITES"), adds)
    for name in (
        "_statistics",
        "_combine_statistics",
        "_apply",
        "_backward_sums",
        "_backward",
        "_add_up",
    ):
        kernel = getattr(module, name)
        given = {k: v for k, v in constants.items() if k in kernel.arg_names}
        assert compile_for_h100(kernel, types, given, tmp_path, monkeypatch), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(2, 5, 3, 3), (8, 24, 14, 14), (64, 64, 56, 56), (32, 2048, 7, 7)]
)
def test_the_kernels_have_pytorchs_numbers_on_a_gpu(shape, dtype):
    torch.manual_seed(0)
    with torch.device("cuda"):
        for act, adds in (("relu", False), ("relu", True), ("none", True), ("relu6", False)):
            _compare(shape, dtype, act, adds)


def _direction(fused, model, images, amp):
    """Return the median of the cosines between the gradients of two networks' weights."""
    device, found = images[0].device, []
    labels = torch.arange(len(images[0]), device=device) % 10
    for network in (fused, model):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp, cache_enabled=False):
            logits = network.forward_all(images)
        sum(F.cross_entropy(z.float(), labels) for z in logits).backward()
        found.append([p.grad.flatten().double() for p in network.network.parameters()])
    pairs = zip(*found, strict=True)
    return torch.stack([F.cosine_similarity(a, b, 0) for a, b in pairs]).median()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(
    ("arch", "amp"),
    # Deeper networks, as they are initialised, make of bfloat16's rounding quite another gradient.
    [
        ("parallel_resnet18", True),
        ("parallel_resnet50", False),
        ("parallel_mobilenetv2", False),
    ],
)
def test_a_fused_network_trains_as_its_own_on_a_gpu(arch, amp, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = torch.device("cuda", 0)
    model = create_model(ModelConfig(arch, 10, (64, 48))).to(device)
    model = model.to(memory_format=torch.channels_last)
    fused = copy.deepcopy(model)
    fuse_batchnorm(fused, arch)
    images = [torch.randn(16, 3, s, s, device=device) for s in (64, 48)]
    images = [x.contiguous(memory_format=torch.channels_last) for x in images]
    assert _direction(fused, model, images, amp) > (0.9 if amp else 0.99)

"""Names to networks, their initialisation and their cost."""

from __future__ import annotations

import copy
import functools
import math
from contextlib import nullcontext

import pytest
import torch
import torchvision
from torch import nn

from pipelines.utils.errors import UsageError
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import (
    create_model,
    list_models,
    synchronize_batchnorm,
)
from rsnet.models.shapes import gmacs
from rsnet.models.switchable import SwitchableBatchNorm2d

# Forward GMACs an image at 224 and 96 pixels, as papers and torchvision give them.
GMACS = {
    "parallel_resnet18": (1.81, 0.33),
    "parallel_resnet50": (4.09, 0.75),
    "parallel_mobilenetv2": (0.30, 0.06),
}


@functools.cache
def _on_meta(arch, sizes=(224, 192, 160, 128, 96)):
    with torch.device("meta"):
        return create_model(ModelConfig(arch, 1000, sizes))


@pytest.mark.parametrize("arch", GMACS)
def test_gmacs_are_the_known_ones(arch):
    found = [gmacs(_on_meta(arch), size) for size in (224, 96)]
    assert found == pytest.approx(GMACS[arch], abs=0.006)


@pytest.mark.parametrize(
    ("arch", "share"),
    [("parallel_resnet18", 0.3), ("parallel_resnet50", 0.8), ("parallel_mobilenetv2", 3.9)],
)
def test_private_batchnorm_adds_the_papers_share_of_parameters(arch, share):
    five, one = _on_meta(arch), _on_meta(arch, (224,))
    count = [sum(p.numel() for p in m.parameters()) for m in (five, one)]
    assert 100 * (count[0] / count[1] - 1) == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("arch", ["parallel_resnet18", "parallel_mobilenetv2"])
def test_initialisation_is_the_originals(arch):
    model = create_model(ModelConfig(arch, 1000, (64, 32)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # N(0, sqrt(2 / (k * k * out))): Kaiming, fan-out, also for depthwise convolutions.
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            w = module.weight
            assert w.std().item() == pytest.approx(
                math.sqrt(2 / fan_out), rel=5 / math.sqrt(2 * w.numel())
            )
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    if arch == "parallel_mobilenetv2":
        linear = model.network.classifier[1]
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.01)
        assert (linear.bias == 0).all()
        assert model.network.classifier[0].p == 0


@pytest.mark.parametrize(
    "arch", ["parallel_densenet121", "parallel_regnet_y_400mf", "parallel_timm/resnet10t"]
)
def test_other_families_become_switchable(arch):
    model = create_model(ModelConfig(arch, 7, (64, 48))).eval()
    assert any(isinstance(m, SwitchableBatchNorm2d) for m in model.modules())
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 7)


def test_every_listed_arch_has_batchnorm_and_no_other_has():
    """The list is by name, to be quick; small members stand for their families."""
    small = {
        "alexnet", "convnext_tiny", "squeezenet1_0", "swin_t", "vit_b_32", "vgg11", "vgg11_bn",
        "densenet121", "efficientnet_b0", "mnasnet0_5", "mobilenet_v3_small", "regnet_x_400mf",
        "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "wide_resnet50_2",
    }  # fmt: skip
    for name in small:
        # RegNet computes its widths with tensors.
        with nullcontext() if "regnet" in name else torch.device("meta"):
            network = torchvision.models.get_model(name)
        has = any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
        assert has == (f"parallel_{name}" in list_models()), name


def test_width_multiplies_where_the_network_has_it():
    with torch.device("meta"):
        half = create_model(ModelConfig("parallel_mobilenetv2", 10, (64,), width_mult=0.5))
        reference = torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.5)
    assert half.network.classifier[1].weight.shape == reference.classifier[1].weight.shape
    with pytest.raises(UsageError, match=r"--width-mult 0\.5: parallel_densenet121 has no width"):
        create_model(ModelConfig("parallel_densenet121", 10, (64,), width_mult=0.5))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_scaled_resnet_is_torchvisions_with_fewer_channels(arch):
    """At half the width each convolution has half the channels of torchvision's, in the same order."""
    with torch.device("meta"):
        half, same = (
            create_model(ModelConfig(f"parallel_{arch}", 10, (64,), width_mult=width)).network
            for width in (0.5, 1.0)
        )
        whole = torchvision.models.get_model(arch, num_classes=10)
    convs = [[m for m in n.modules() if isinstance(m, nn.Conv2d)] for n in (half, whole)]
    for ours, theirs in zip(*convs, strict=True):
        assert ours.out_channels * 2 == theirs.out_channels
        assert (ours.stride, ours.kernel_size) == (theirs.stride, theirs.kernel_size)
    assert half.fc.in_features * 2 == whole.fc.in_features
    assert sum(p.numel() for p in same.parameters()) == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("mode", ["resnet", "preact", "preact_typeA"])
@pytest.mark.parametrize("arch", ["parallel_resnet10", "parallel_resnet50"])
def test_networks_whose_stages_all_have_the_least_width_still_shrink_the_image(arch, mode):
    config = ModelConfig(arch, 3, (64, 33, 16), width_mult=0.01, mode=mode)
    model = create_model(config).eval()
    channels = []
    model.network.avgpool.register_forward_pre_hook(lambda _m, x: channels.append(x[0].shape[1:]))
    for size in model.sizes:
        assert model(torch.randn(1, 3, size, size)).shape == (1, 3)
    width = 8 if arch == "parallel_resnet10" else 32
    assert channels == [(width, 2, 2), (width, 2, 2), (width, 1, 1)]


def test_resnet10_has_one_block_a_stage():
    with torch.device("meta"):
        network = create_model(ModelConfig("parallel_resnet10", 10, (64,))).network
    assert [len(getattr(network, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert network.fc.in_features == 512


@pytest.mark.parametrize(
    ("arch", "width_mult", "stride"),
    [
        ("parallel_resnet10", 0.25, 8),
        ("parallel_mobilenetv2", 0.25, 16),
        ("parallel_timm/resnet18", 1.0, 8),
    ],
)
def test_the_small_stem_shrinks_the_image_less(arch, width_mult, stride):
    config = ModelConfig(arch, 10, (32, 16), width_mult=width_mult, stem="small")
    model = create_model(config).eval()
    shapes = []
    last = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
    last.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape[-1]))
    model(torch.randn(1, 3, 32, 32))
    assert shapes == [32 // stride]
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (first.kernel_size, first.stride) == ((3, 3), (1, 1))
    fan_out = 9 * first.out_channels
    assert first.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.15)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("parallel_resnet51", r"did you mean .*parallel_resnet50"),
        ("ResNet_50", r"did you mean .*parallel_resnet50"),
        ("resnet18d", r"did you mean parallel_timm/resnet18d\?"),
        ("parallel_timm/resnet18x", r"did you mean parallel_timm/resnet18"),
        ("parallel_timm/vit_tiny_patch16_224", "has no BatchNorm"),
        ("parallel_vit_b_16", "unknown"),
    ],
)
def test_an_unknown_arch_suggests_near_names(arch, message):
    with torch.device("meta"), pytest.raises(UsageError, match=message):
        create_model(ModelConfig(arch, 10, (64,)))


@pytest.mark.parametrize(
    ("arch", "sizes", "message"),
    [
        ("parallel_resnet18", (32, 15), "15 is too small for parallel_resnet18, .* use 16 or more"),
        ("parallel_vgg11_bn", (64, 16), "parallel_vgg11_bn does not work at 16"),
        ("parallel_inception_v3", (64,), "parallel_inception_v3 does not work at 64"),
    ],
)
def test_sizes_too_small_for_the_network_are_refused(arch, sizes, message):
    with torch.device("meta"), pytest.raises(UsageError, match=message):
        create_model(ModelConfig(arch, 10, sizes))


@pytest.mark.parametrize("name", ["levit_128s", "botnet26t_256"])
def test_a_network_of_one_size_works_there_and_says_that_it_takes_no_other(name):
    timm = pytest.importorskip("timm")
    own = timm.get_pretrained_cfg(name).input_size[-1]
    arch = f"parallel_timm/{name}"
    with torch.device("meta"):
        assert create_model(ModelConfig(arch, 10, (own,))).sizes == (own,)
        with pytest.raises(UsageError) as error:
            create_model(ModelConfig(arch, 10, (own, 64)))
    assert str(error.value).startswith(f"--sizes: {arch} does not work at 64 (")
    assert str(error.value).endswith(f"); it takes {own} alone")


def test_a_deepcopy_of_a_built_network_computes_the_same():
    model = create_model(ModelConfig("parallel_resnet10", 5, (32, 16), width_mult=0.25)).eval()
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("arch", ["parallel_resnet10", "parallel_timm/resnet10t"])
def test_synchronized_batchnorm_stays_private(arch):
    """And keeps its weights, names and, of timm's layers, activations; it is computed on GPUs alone."""
    model = create_model(ModelConfig(arch, 3, (64, 32)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    private = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    acting = [type(m.act) for m in private if hasattr(m, "act")]
    synchronize_batchnorm(model, arch)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    synced = [m for m in model.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert len(synced) == len(private)
    assert [type(m.act) for m in synced if hasattr(m, "act")] == acting
    assert {len(norm.by_resolution) for norm in model._norms} == {2}


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("parallel_resnet10", {}),
        ("parallel_resnet50", {}),
        ("parallel_mobilenetv2", {}),
        ("parallel_resnet10", {"mode": "preact", "qw": 2, "qa": 2}),
        ("parallel_resnet50", {"mode": "preact_typeA", "qw": 2, "qa": 2}),
        ("parallel_resnet10", {"tf_padding": True, "qw": 2}),
    ],
)
def test_feature_maps_and_gradients_of_convolutions_are_channels_last_everywhere(arch, options):
    model = (
        create_model(ModelConfig(arch, 4, (64, 32), width_mult=0.25, **options))
        .to(memory_format=torch.channels_last)
        .train()
    )
    strayed = []

    def check(name, x):
        # Of one pixel or one channel all layouts are the same.
        if min(x.shape[1:]) > 1 and not x.is_contiguous(memory_format=torch.channels_last):
            strayed.append((name, x.stride()))

    def watch(name, module, y):
        if isinstance(y, torch.Tensor) and y.ndim == 4:
            check(name, y)
            if isinstance(module, nn.Conv2d):
                y.register_hook(lambda gradient: check(f"gradient of {name}", gradient))

    for name, module in model.network.named_modules():
        module.register_forward_hook(lambda m, _x, y, n=name: watch(n, m, y))
    images = [torch.randn(4, 3, s, s).to(memory_format=torch.channels_last) for s in (64, 32)]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logits = model.forward_all(images)
    sum(z.float().sum() for z in logits).backward()
    assert strayed == []

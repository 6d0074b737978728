"""A frozen network that teaches: what it sees, what it answers, and that it stays as it is."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torchvision.models.vision_transformer import VisionTransformer

from pipelines.normalize import MEAN_STD, PixelNormalizer
from rsnet.config.model_config import ModelConfig
from rsnet.models.autocast import autocast
from rsnet.models.factory import create_model
from rsnet.models.resnet import scaled_resnet
from rsnet.models.shapes import gmacs
from rsnet.models.teacher import Teacher
from tests.helpers.runs import trained

SIZES = (32, 24, 16)
CPU = torch.device("cpu")


def _switchable(**more):
    config = ModelConfig("parallel_resnet10", 5, SIZES, width_mult=0.125, stem="small", **more)
    model = create_model(config)
    model.load_state_dict(trained(config.to_dict(), 3))
    return model.eval()


def _images(sizes=(28, *SIZES)):
    return tuple(torch.randn(3, 3, s, s) for s in sizes)


@torch.no_grad()
def test_an_rs_net_answers_at_its_size_or_as_its_ensemble():
    model, images = _switchable(), _images()
    alone = [model(x) for x in images[1:]]
    shares = model.alpha.exp() / model.alpha.exp().sum()
    ensemble = sum(share * z for share, z in zip(shares, alone, strict=True))
    order = (28, *SIZES)
    for sizes, expected in (((24,), alone[1]), (SIZES, ensemble)):
        found = Teacher(copy.deepcopy(model), sizes, order)(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_in_half_precision_are_averaged_in_float32():
    teacher, images = Teacher(_switchable(), SIZES, (28, *SIZES)), _images()
    with autocast(CPU, torch.bfloat16):
        alone = [Teacher(_switchable(), (s,), (28, *SIZES))(images).double() for s in SIZES]
        found = teacher(images)
    shares = teacher.alpha.double().softmax(0)
    expected = sum(share * z for share, z in zip(shares, alone, strict=True))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_quantized_activations_are_computed_as_they_are():
    """Not folded: rounding would move some of them by a level."""
    model = _switchable(mode="preact", qw=2, qa=2)
    images = _images()
    for amp in (None, torch.bfloat16):
        teacher = Teacher(copy.deepcopy(model), (24,), (28, *SIZES))
        teacher.cast(amp)
        with autocast(CPU, amp):
            assert torch.equal(teacher(images), model(images[2]))


@pytest.mark.parametrize(
    ("theirs", "own"), [("imagenet", "unit"), ("unit", "clip"), ("dpn", "dpn")]
)
def test_pixels_are_normalised_anew_as_from_the_bytes(theirs, own):
    pixels = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    images = PixelNormalizer(CPU, torch.float32, theirs)(pixels).permute(0, 3, 1, 2)
    teacher = Teacher(torch.nn.Flatten(), (32,), (32,))
    teacher.renormalize(MEAN_STD[theirs], MEAN_STD[own])
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in MEAN_STD[own])
    expected = ((pixels - mean) / std).permute(0, 3, 1, 2)
    found = teacher((images,))
    torch.testing.assert_close(found.double(), expected.flatten(1), rtol=1e-5, atol=1e-5)
    kept = []
    teacher.networks[0].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    teacher((images,))
    assert kept[0].is_contiguous(memory_format=torch.channels_last)
    assert (kept[0] is images) == (theirs == own)


def test_outputs_are_put_into_the_order_that_is_trained():
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    teacher = Teacher(network, (8,), (8,))
    image = torch.arange(3.0).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    teacher.outputs = torch.tensor([2, 0, 1])
    assert teacher((image,)).tolist() == [[2, 0, 1]] * 2


def test_it_stays_as_it_is_whatever_is_asked_of_it():
    network = scaled_resnet("resnet10", 5, 0.125)
    teacher = Teacher(network, (32,), SIZES)
    before = copy.deepcopy(teacher.state_dict())
    teacher.train()
    logits = teacher(_images(SIZES))
    assert not logits.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert teacher.gmacs == gmacs(network, 32)
    stored = sum(v.nbytes for v in network.state_dict().values())
    assert teacher.megabytes == pytest.approx(stored / 2**20)


NETWORKS = {
    "convolutions": lambda: scaled_resnet("resnet10", 5, 0.125),
    "torchvision's attention": lambda: VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5),
    "timm's attention": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_half_precision_has_autocasts_bits_in_half_the_memory(name):
    """Also of networks without BatchNorm."""
    network = NETWORKS[name]().eval()
    for parameter in network.parameters():  # torchvision's classifier is 0
        torch.nn.init.normal_(parameter, 0, 0.1)
    x = torch.randn(2, 3, 32, 32)
    with autocast(CPU, torch.bfloat16):
        expected = network(x)
        teacher = Teacher(copy.deepcopy(network), (32,), (32,))
        before = teacher.megabytes
        teacher.cast(torch.bfloat16)
        assert torch.equal(teacher((x,)), expected)
    assert expected.std() > 0
    assert teacher.megabytes < 0.75 * before

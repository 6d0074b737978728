"""Convolutions that go round oneDNN: the plain ones' numbers, no crash, nothing from outside the image."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.models.layers import onednn_workarounds
from rsnet.models.layers.conv import convert_to_blurpool, convert_to_same_padding
from rsnet.models.layers.onednn_workarounds import (
    DepthwiseConv2d,
    SinglePixelConv2d,
    SubsampledConv2d,
    convert_depthwise_convs,
    convert_pointwise_convs,
    convert_single_pixel_convs,
)


def _within_nans(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A channels-last tensor whose memory has NaN before and after it."""
    n, c, h, w = shape
    memory = torch.full((n * c * h * w + 2**17,), torch.nan, dtype=dtype)
    inside = memory[2**16 : -(2**16)].normal_()
    return inside.view(n, h, w, c).permute(0, 3, 1, 2)


@pytest.mark.parametrize("pixels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("groups", [1, 32])
def test_bfloat16_gradients_of_few_pixels_are_float32s(pixels, groups):
    """Fails for one pixel with plain nn.Conv2d on a CPU with AVX-512 bfloat16 (oneDNN)."""
    layer = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=groups, bias=False))
    convert_single_pixel_convs(layer)
    layer = layer.to(torch.bfloat16, memory_format=torch.channels_last)
    exact = copy.deepcopy(layer).float()
    x = _within_nans((25, 32, pixels, pixels), torch.bfloat16)
    y = layer(x)
    incoming = _within_nans(tuple(y.shape), torch.bfloat16)
    y.backward(incoming)
    exact(x.float()).backward(incoming.float())
    expected = exact[0].weight.grad
    error = (layer[0].weight.grad.float() - expected).abs().max() / expected.abs().max()
    assert error < 0.02


def test_one_pixel_gives_what_a_plain_convolution_gives():
    plain = nn.Conv2d(8, 6, (3, 5), stride=2, padding=(1, 2))
    ours = nn.Sequential(copy.deepcopy(plain))
    convert_single_pixel_convs(ours)
    assert type(ours[0]) is SinglePixelConv2d
    x = torch.randn(4, 8, 1, 1)
    torch.testing.assert_close(ours(x), plain(x))


def _run(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor, amp: bool):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp, cache_enabled=False):
        y = layer(x)
    y.backward(upstream.to(y.dtype))
    return y.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize(
    "chunk", [2**20, 24 * 81 * 3, 1]
)  # four images at once, 3 and 1, one by one
@pytest.mark.parametrize(
    ("kernel", "stride", "pixels"),
    [(3, 2, 15), (5, 1, 9), (5, 2, 8), (3, 2, 1), ((3, 5), (2, 1), 7)],
)
def test_a_depthwise_one_is_a_plain_one_with_gradients_nearer_to_float64(
    kernel, stride, pixels, chunk, monkeypatch
):
    monkeypatch.setattr(onednn_workarounds, "CHUNK", chunk)
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    half = tuple(k // 2 for k in sides)
    plain = nn.Conv2d(24, 24, kernel, stride, half, groups=24, bias=False)
    ours = copy.deepcopy(plain)
    convert_depthwise_convs(ours)
    assert type(ours) is DepthwiseConv2d
    x = torch.randn(4, 24, pixels, pixels).bfloat16().float()
    upstream = torch.randn_like(plain(x)).bfloat16().float()
    y, of_x, of_weight = _run(ours, x, upstream, amp=True)
    expected = _run(plain, x, upstream, amp=True)
    assert torch.equal(y, expected[0])
    assert (y.dtype, of_weight.dtype) == (torch.bfloat16, torch.float32)
    rounded = copy.deepcopy(plain).double()
    rounded.weight.data = plain.weight.detach().bfloat16().double()
    _, exact_x, exact_weight = _run(rounded, x.double(), upstream.double(), amp=False)
    torch.testing.assert_close(of_x.double(), exact_x, rtol=2**-8, atol=1e-5)  # rounded once
    torch.testing.assert_close(of_weight.double(), exact_weight, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(
        _run(ours, x, upstream, amp=False), _run(plain, x, upstream, False), strict=True
    ):
        assert torch.equal(found, wanted)


def test_depthwise_gradients_of_single_pixels_do_not_come_from_outside_the_image():
    layer = nn.Conv2d(24, 24, 3, 2, 1, groups=24, bias=False)
    convert_depthwise_convs(layer)
    x = torch.ones(2, 24, 1, 1)
    _, _, of_weight = _run(layer, x, torch.ones(2, 24, 1, 1), amp=True)
    expected = torch.zeros(24, 1, 3, 3)
    expected[:, :, 1, 1] = 2.0
    assert torch.equal(of_weight, expected)


def test_convolutions_that_pad_or_blur_their_input_still_do():
    timm = pytest.importorskip("timm", reason="a convolution of timm's, which pads as TensorFlow")
    own = timm.layers.Conv2dSame(8, 8, 3, stride=2, groups=8, bias=False)
    padded, blurred = (nn.Conv2d(24, 24, 3, 2, 1, groups=24, bias=False) for _ in range(2))
    convert_to_same_padding(padded)
    convert_to_blurpool(blurred)
    for layer in (own, padded, blurred):
        x = torch.randn(2, layer.in_channels, 8, 8)
        before = layer(x)
        convert_depthwise_convs(layer)
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize(("pixels", "stride"), [(48, 2), (7, 2), (8, (2, 3)), (1, 2)])
def test_a_subsampled_one_gives_what_a_plain_one_gives(pixels, stride):
    plain = nn.Sequential(nn.Conv2d(8, 24, 1, stride=stride)).double()
    subsampled = copy.deepcopy(plain)
    convert_pointwise_convs(subsampled)
    assert type(subsampled[0]) is SubsampledConv2d
    x = torch.randn(3, 8, pixels, pixels, dtype=torch.double)
    results = []
    for layer in (plain, subsampled):
        y = layer(x)
        y.square().sum().backward()
        results.append((y, *(p.grad for p in layer.parameters())))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_network_of_eight_channels_trains_in_float32():
    """Crashes, or has wrong gradients, with plain convolutions on a CPU with AVX-512 (oneDNN)."""
    torch.manual_seed(0)
    model = create_model(
        ModelConfig("parallel_resnet10", 3, [48, 24], width_mult=0.125, stem="small")
    )
    exact = copy.deepcopy(model).double()
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 48, 48).to(memory_format=torch.channels_last)
    for network, images in ((model, x), (exact, x.double())):
        network(images).square().sum().backward()
    for name in ("layer2", "layer3", "layer4"):
        found, expected = (
            getattr(m.network, name)[0].downsample[0].weight.grad for m in (model, exact)
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("convert", "others"),
    [
        (
            convert_single_pixel_convs,
            [
                nn.Conv2d(3, 3, 3, padding=1),
                nn.Conv2d(3, 3, 1, stride=2),
                nn.Conv2d(3, 3, 3, stride=2),
                nn.Conv2d(3, 3, 3, stride=2, padding=1, padding_mode="reflect"),
            ],
        ),
        (
            convert_depthwise_convs,
            [
                nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False),
                nn.Conv2d(8, 8, 3, 2, 1, groups=4, bias=False),
                nn.Conv2d(8, 8, 3, 2, 1, groups=8),
                nn.Conv2d(8, 16, 3, 2, 1, groups=8, bias=False),
            ],
        ),
        (
            convert_pointwise_convs,
            [
                nn.Conv2d(16, 8, 1, stride=2),
                nn.Conv2d(8, 8, 3, stride=2),
                nn.Conv2d(8, 8, 1),
            ],
        ),
    ],
)
def test_other_convolutions_stay_as_they_are(convert, others):
    convert(nn.Sequential(*others))
    assert {type(layer) for layer in others} == {nn.Conv2d}

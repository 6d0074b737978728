"""Depthwise convolutions: the plain one's numbers, with gradients that are rounded less."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rsnet.models.layers import onednn_workarounds as depthwise
from rsnet.models.layers.conv import convert_to_blurpool, convert_to_same_padding
from rsnet.models.layers.onednn_workarounds import DepthwiseConv2d, convert_depthwise_convs


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
def test_it_is_a_plain_convolution_with_gradients_nearer_to_float64(
    kernel, stride, pixels, chunk, monkeypatch
):
    monkeypatch.setattr(depthwise, "CHUNK", chunk)
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


def test_others_stay_as_they_are():
    layers = nn.Sequential(
        nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False),
        nn.Conv2d(8, 8, 3, 2, 1, groups=4, bias=False),
        nn.Conv2d(8, 8, 3, 2, 1, groups=8),
        nn.Conv2d(8, 16, 3, 2, 1, groups=8, bias=False),
    )
    convert_depthwise_convs(layers)
    assert {type(layer) for layer in layers} == {nn.Conv2d}


def test_single_pixels_do_not_lead_outside_the_picture():
    """As for the other convolutions of one pixel; here the float32 gradients are right."""
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

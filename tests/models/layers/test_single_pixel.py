"""Convolutions of one pixel: the same numbers, and gradients that come from the picture alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rsnet.models.layers.onednn_workarounds import SinglePixelConv2d, convert_single_pixel_convs


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


def test_other_convolutions_stay_as_they_are():
    kept = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Conv2d(3, 3, 1, stride=2),
        nn.Conv2d(3, 3, 3, stride=2),
        nn.Conv2d(3, 3, 3, stride=2, padding=1, padding_mode="reflect"),
    )
    convert_single_pixel_convs(kept)
    assert {type(m) for m in kept} == {nn.Conv2d}

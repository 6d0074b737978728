"""Normalisation against torchvision's."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import functional as F

from pipelines.normalize import MEAN_STD, PixelNormalizer, byte_table


@pytest.mark.parametrize("normalize", ["imagenet", "unit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_is_normalised_as_torchvision_does(normalize, dtype):
    mean, std = ([v / 255 for v in values] for values in MEAN_STD[normalize])
    every_byte = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 3)
    expected = F.normalize(every_byte.T[:, None] / 255, mean, std)[:, 0].T
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    computed = PixelNormalizer(torch.device("cpu"), dtype, normalize)(every_byte)
    assert computed.dtype == dtype
    torch.testing.assert_close(computed.float(), expected, rtol=tolerance, atol=tolerance)
    table = byte_table(dtype, normalize).T
    assert table.dtype == dtype
    torch.testing.assert_close(table.float(), expected, rtol=tolerance, atol=tolerance)

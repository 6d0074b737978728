"""The rules that all pipelines share, against torchvision."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import functional as F

from pipelines.normalize import MEAN_STD, PixelNormalizer, byte_table
from pipelines.transforms import eval_view

SHAPES = [(500, 375), (375, 500), (333, 500), (64, 64), (51, 77), (17, 300), (299, 16), (1, 9)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("size", [224, 193, 160, 33, 32])
def test_the_evaluations_view_is_torchvisions(height, width, size):
    # A picture of its own coordinates: what is cut out says where it was cut.
    resized = F.resize(torch.zeros(1, height, width), [int(size / 0.875)])
    rows, columns = (torch.arange(n) for n in resized.shape[1:])
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    top, left = F.center_crop(grid, [size])[:, 0, 0].tolist()
    assert eval_view(height, width, size) == (*resized.shape[1:], top, left)


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

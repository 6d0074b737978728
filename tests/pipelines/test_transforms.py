"""The crop of training and the view of evaluation, against torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from pipelines.sampler import crop_params
from pipelines.transforms import CropParams, eval_short_side, eval_view, random_resized_crop

SHAPES = [(500, 375), (375, 500), (333, 500), (64, 64), (51, 77), (17, 300), (299, 16), (1, 9)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("size", [224, 193, 160, 33, 32])
def test_the_evaluations_view_is_torchvisions(height, width, size):
    # An image of its own coordinates shows where it was cut.
    resized = F.resize(torch.zeros(1, height, width), [int(size / 0.875)])
    rows, columns = (torch.arange(n) for n in resized.shape[1:])
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    top, left = F.center_crop(grid, [size])[:, 0, 0].tolist()
    assert eval_view(height, width, size) == (*resized.shape[1:], top, left)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 100), (40, 41)])
def test_crops_are_distributed_as_torchvisions(height, width):
    n = 4000
    params = crop_params(0, 0, np.arange(n), 5, "independent")
    ours = np.array([random_resized_crop(height, width, params, i) for i in range(n)])
    image = np.empty((3, height, width), dtype=np.uint8)

    blank = torch.from_numpy(image)
    crop = RandomResizedCrop(224)
    theirs = np.array([crop.get_params(blank, crop.scale, crop.ratio) for _ in range(n)])
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / n) + 1e-9
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 5 * error).all()
    spread = np.abs(ours.std(axis=0) - theirs.std(axis=0))
    assert (spread < 5 * error + 0.5).all()


def test_an_image_that_no_try_fits_gets_the_centre():
    """torchvision's fallback: the largest centred crop within the ratios."""
    never = CropParams(
        np.ones((1, 10)), np.full((1, 10), 4 / 3), np.zeros((1, 2)), np.zeros((1, 5)) > 0
    )
    assert random_resized_crop(400, 100, never, 0) == (133, 0, 133, 100)
    assert random_resized_crop(100, 400, never, 0) == (0, 133, 100, 133)


@pytest.mark.parametrize(("size", "short"), [(224, 256), (192, 219), (160, 182), (96, 109)])
def test_the_short_side_is_cut_to_a_whole_number(size, short):
    assert eval_short_side(size) == short

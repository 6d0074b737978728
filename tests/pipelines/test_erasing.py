"""The boxes of random erasing, against torchvision's. Where they lie, test_pipeline_contract.py has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pipelines.erasing import LANES, Boxes
from pipelines.sampler import ERASING_LANE, uniforms

MANY = 3000
# Largest distance of two empirical distributions of so many draws each, but for one in 10^4.
DISTANCE = 2.23 * (2 / MANY) ** 0.5


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov's and Smirnov's, of two samples of MANY values."""
    values = np.concatenate((a, b))
    below = [np.searchsorted(np.sort(x), values, side="right") for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max()) / MANY


def test_boxes_are_distributed_as_torchvisions():
    side = 1000
    eraser, image = v2.RandomErasing(p=1), torch.empty(3, side, side)
    drawn = [eraser.make_params([image]) for _ in range(MANY)]
    theirs = np.array([[d["i"], d["j"], d["h"], d["w"]] for d in drawn]) / side
    numbers = uniforms(0, 0, np.arange(MANY + 10), LANES, ERASING_LANE)
    places, edges = Boxes.from_uniforms(numbers, 1.0)
    assert len(places) >= MANY
    ours = np.hstack((edges[:, :2], edges[:, 2:] - edges[:, :2]))[:MANY]
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert _distance(a, b) < DISTANCE
    areas, their_areas = (x[:, 2] * x[:, 3] for x in (ours, theirs))
    assert _distance(areas, their_areas) < DISTANCE
    assert _distance(*(x[:, 2] / x[:, 3] for x in (ours, theirs))) < DISTANCE
    assert 0.02 <= areas.min() < areas.max() <= 0.33
    assert edges.min() >= 0
    assert edges.max() <= 1


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_given_share_of_the_samples_is_erased(share):
    numbers = uniforms(0, 0, np.arange(4000), LANES, ERASING_LANE)
    found = len(Boxes.from_uniforms(numbers, share).places) / 4000
    assert found == pytest.approx(share, abs=5 * (share * (1 - share) / 4000) ** 0.5 + 1e-3)

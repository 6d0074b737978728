"""The boxes of random erasing, against torchvision's. Where they lie, test_pipeline_contract.py has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pipelines import erasing
from pipelines.batch import Batch
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


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mask_for_the_batch_erases_the_same_bits_as_a_box_after_the_other(share, monkeypatch):
    """As on a GPU, whose kernels a box at a time would be many to launch."""
    numbers = uniforms(3, 0, np.arange(40), LANES, ERASING_LANE)
    boxes, flip = Boxes.from_uniforms(numbers, share), numbers[:, :3] < 0.5
    images = [torch.randn(40, 3, s, s).to(torch.bfloat16) for s in (32, 24, 7)]
    images[1] = images[1].contiguous(memory_format=torch.channels_last)
    each, masked = (Batch(tuple(x.clone() for x in images), torch.zeros(40)) for _ in range(2))
    erasing.erase(each, boxes, flip)
    monkeypatch.setattr(erasing, "_fill_each", erasing._fill_masked)
    erasing.erase(masked, boxes, flip)
    for a, b, before in zip(each.images, masked.images, images, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, before) == (share == 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_erases_the_same_bits():
    numbers = uniforms(3, 0, np.arange(40), LANES, ERASING_LANE)
    boxes, flip = Boxes.from_uniforms(numbers, 0.5), numbers[:, :1] < 0.5
    host = Batch((torch.randn(40, 3, 32, 32),), torch.zeros(40))
    device = Batch((host.images[0].cuda(),), torch.zeros(40))
    for batch in (host, device):
        erasing.erase(batch, boxes, flip)
    assert torch.equal(device.images[0].cpu(), host.images[0])

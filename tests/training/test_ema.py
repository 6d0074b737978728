"""Averaged weights against the sum written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.optim import ModelEma


def _model() -> ResolutionSwitchable:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return ResolutionSwitchable(network, (16, 8))


def _train_a_little(model: ResolutionSwitchable, sizes=(16, 8)) -> None:
    for size in sizes:
        model(torch.randn(4, 3, size, size) + 1, size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


def test_weights_and_every_resolutions_statistics_are_averaged():
    model, decay = _model(), 0.5
    ema = ModelEma(model, decay)
    expected = {k: v.double().clone() for k, v in model.state_dict().items()}
    for step in range(6):
        _train_a_little(model)
        ema.update(step)
        d = min(decay, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            expected[key] = d * expected[key] + (1 - d) * value
    for key, value in ema.model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert value == model.state_dict()[key] == 6
        else:
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)


def test_a_size_that_took_no_part_pulls_its_average_towards_its_own_batchnorm():
    model = _model()
    ema = ModelEma(model, 0.5)
    _train_a_little(model)
    for step in range(60):
        ema.update(step)
    for ours, theirs in zip(ema.model.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_average_is_not_trained_and_stays_in_evaluation():
    ema = ModelEma(_model(), 0.9)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training


def test_the_average_is_short_at_first():
    """After one update a decay of 0.9999 would leave the initial weights as they are."""
    model = _model()
    before = model.state_dict()["network.0.weight"].clone()
    ema = ModelEma(model, 0.9999)
    with torch.no_grad():
        model.network[0].weight.add_(1)
    ema.update(0)
    moved = (ema.model.network[0].weight - before).mean().item()
    assert moved == pytest.approx(0.9)

"""Sizes that a network does not take, and that each network is asked once."""

from __future__ import annotations

import pytest
from torch import nn

from pipelines.utils.errors import UsageError
from rsnet.config.model_config import ModelConfig
from rsnet.models import factory
from rsnet.models.shapes import check_sizes, gmacs
from rsnet.models.switchable import ResolutionSwitchable


class _Windowed(nn.Module):
    """Raises what no library of ours does, at sizes that seven does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        if x.shape[-1] % 7:
            raise LookupError(f"no window for {x.shape[-1]}\nas told")
        return self.bn(self.conv(x)).mean((2, 3))


def test_whatever_a_forward_raises_is_one_line_that_names_the_sizes_that_work():
    check_sizes(ResolutionSwitchable(_Windowed(), (56, 28)), "parallel_x")
    with pytest.raises(UsageError) as error:
        check_sizes(ResolutionSwitchable(_Windowed(), (56, 40, 28)), "parallel_x")
    message = "--sizes: parallel_x does not work at 40 (no window for 40); of these sizes, it works at 56 28"
    assert str(error.value) == message


def test_the_sizes_of_training_images_are_asked_for_too():
    model = ResolutionSwitchable(_Windowed(), (56, 28))
    with pytest.raises(
        UsageError, match=r"^--train-size-scale 0.9: parallel_x does not work at 52 "
    ):
        check_sizes(model, "parallel_x", (52, 28), "--train-size-scale 0.9")


def test_an_image_costs_what_it_costs_a_network_of_its_size():
    smaller = ModelConfig("parallel_resnet10", 3, (48, 24), width_mult=0.125)
    models = [factory.create_model(c) for c in (smaller, smaller.with_sizes((64, 32)))]
    assert gmacs(models[0], 48) == gmacs(models[1], 48) < gmacs(models[1], 64)


def test_a_network_is_asked_once_whether_it_takes_its_sizes(monkeypatch):
    asked = []
    monkeypatch.setattr(factory, "_checked", set())
    monkeypatch.setattr(factory, "check_sizes", lambda model, _: asked.append(model.sizes))
    config = ModelConfig("parallel_resnet10", 3, (64, 32), width_mult=0.125)
    for each in (config, config, config.with_sizes((64, 48)), config):
        factory.create_model(each)
    assert asked == [(64, 32), (64, 48)]

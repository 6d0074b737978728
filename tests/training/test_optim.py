"""The learning rate of every step, against the formulas written plainly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.training.optim import LrSchedule, load_optimizer_state, make_sgd


def _rates(decay, **more):
    schedule = LrSchedule(0.4, decay, steps=120, steps_per_epoch=1, **more)
    return [schedule.at(step) for step in range(120)]


def test_cosine_falls_by_iteration_to_zero():
    expected = [0.2 * (1 + math.cos(math.pi * t / 120)) for t in range(120)]
    assert _rates("cosine") == pytest.approx(expected)
    assert LrSchedule(0.4, "cosine", 120, 1).at(120) == pytest.approx(0)


def test_linear_falls_by_iteration_to_zero():
    assert _rates("linear") == pytest.approx([0.4 * (120 - t) / 120 for t in range(120)])


def test_step_decays_every_so_many_epochs():
    rates = _rates("step", step_epochs=30, gamma=0.1)
    assert rates == pytest.approx([0.4] * 30 + [0.04] * 30 + [0.004] * 30 + [0.0004] * 30)


def test_schedule_decays_at_its_epochs():
    rates = _rates("schedule", milestones=(30, 60, 85, 95, 105), gamma=0.1)
    lengths = [30, 30, 25, 10, 10, 15]
    expected = [0.4 * 0.1**i for i, n in enumerate(lengths) for _ in range(n)]
    assert rates == pytest.approx(expected)


def test_epoch_decays_count_epochs_not_steps():
    schedule = LrSchedule(1.0, "step", steps=100, steps_per_epoch=10, step_epochs=2, gamma=0.5)
    assert [schedule.at(t) for t in (0, 19, 20, 39, 40)] == [1, 1, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("decay", ["cosine", "linear", "step"])
def test_warmup_rises_from_zero_and_the_decay_falls_over_what_is_left(decay):
    """The authors' adjust_learning_rate; its step never decays, ours by epochs from the start."""
    falling = {
        "cosine": lambda i: 0.4 * (1 + math.cos(math.pi * (i - 5) / (120 - 5))) / 2,
        "linear": lambda i: 0.4 * (1 - (i - 5) / (120 - 5)),
        "step": lambda i: 0.4 * 0.1 ** (i // 30),
    }[decay]
    expected = [0.4 * i / 5 if i < 5 else falling(i) for i in range(120)]
    assert _rates(decay, warmup_steps=5) == pytest.approx(expected)


def test_warmup_that_the_training_does_not_reach_the_end_of_only_rises():
    rates = _rates("cosine", warmup_steps=240)
    assert rates == pytest.approx([0.4 * i / 240 for i in range(120)])


def test_sgd_holds_every_parameter_exactly_once_with_decay():
    model = create_model(ModelConfig("parallel_resnet18", 10, (32, 16)))
    groups = make_sgd(model, 0.1, 0.9, 1e-4).param_groups
    held = [p for group in groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(list(model.parameters()))
    assert {group["weight_decay"] for group in groups} == {1e-4}


def test_without_decay_of_norms_only_filters_and_the_classifier_decay():
    """By the type of the module that owns a parameter, where the code goes by its dimensions."""
    model = create_model(ModelConfig("parallel_mobilenetv2", 10, (32, 16)))
    decays = {
        id(p): group["weight_decay"]
        for group in make_sgd(model, 0.1, 0.9, 1e-4, norm_decay=False).param_groups
        for p in group["params"]
    }
    assert len(decays) == len(list(model.parameters()))
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            is_weight = isinstance(module, nn.Conv2d | nn.Linear) and name == "weight"
            assert decays[id(p)] == (1e-4 if is_weight else 0.0), (module, name)


def test_a_marked_update_is_skipped_on_the_device():
    weight = torch.nn.Parameter(torch.ones(3))
    model = torch.nn.ParameterList([weight])
    sgd = make_sgd(model, 0.1, 0.9, 0.1)
    weight.grad = torch.full((3,), torch.nan)
    sgd.found_inf = torch.ones(())
    sgd.step()
    assert weight.tolist() == [1, 1, 1]


def test_a_first_update_that_is_skipped_leaves_no_trace():
    """float16's first step often overflows: its momentum must not be what memory happened to hold."""
    weight = torch.nn.Parameter(torch.ones(4096))
    sgd = make_sgd(torch.nn.ParameterList([weight]), 0.1, 0.9, 0.0)
    torch.full((4096,), torch.nan)  # what an uninitialised buffer may get
    weight.grad = torch.full((4096,), torch.inf)
    sgd.found_inf = torch.ones(())
    sgd.step()
    weight.grad = torch.ones(4096)
    sgd.found_inf = torch.zeros(())
    sgd.step()
    torch.testing.assert_close(weight.detach(), torch.full((4096,), 0.9))


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_rate_stays_at_its_end_after_the_last_step(decay):
    schedule = LrSchedule(0.4, decay, steps=100, steps_per_epoch=10)
    assert schedule.at(150) == pytest.approx(0)


def test_momentum_of_other_parameters_is_not_taken_over():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))

    def trained(sgd):
        model(torch.ones(1, 3)).sum().backward()
        sgd.step()
        return sgd.state_dict()

    saved = trained(make_sgd(model, 0.1, 0.9, 0.0))
    sgd = make_sgd(model, 0.2, 0.9, 0.5)
    assert load_optimizer_state(sgd, saved)
    for i, parameter in enumerate(p for group in sgd.param_groups for p in group["params"]):
        assert torch.equal(
            sgd.state[parameter]["momentum_buffer"], saved["state"][i]["momentum_buffer"]
        )
        assert sgd.state[parameter]["momentum_buffer"].any()
    assert {g["lr"] for g in sgd.param_groups} == {0.2}
    # One group for all, as checkpoints once had; no momentum; and another network's.
    one_group = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    other = make_sgd(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(2, 2)), 0.1, 0.9, 0)
    plain = make_sgd(model, 0.1, 0.0, 0.0)
    for saved in (trained(one_group), trained(plain), other.state_dict()):
        fresh = make_sgd(model, 0.1, 0.9, 0.0)
        assert not load_optimizer_state(fresh, saved)
        assert not any(s["momentum_buffer"].any() for s in fresh.state.values())
    assert load_optimizer_state(plain, trained(sgd))

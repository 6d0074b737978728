"""Optimizers other than SGD: their steps against timm's, skipped updates, and what a resume takes over."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import timm.optim
import torch
from torch import nn

from pipelines.batch import Batch
from pipelines.dali import DaliOptions
from pipelines.utils.errors import UsageError
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.command_line import parse
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import resolve
from rsnet.models.factory import create_model
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.optim import load_optimizer_state, make_optimizer
from rsnet.training.state import load_training_state, training_state
from rsnet.training.trainer import Trainer, make_trainer

OPTIMIZERS = ["adamw", "lamb", "muon"]
NETWORK = ModelConfig("parallel_resnet10", 3, (32, 24), width_mult=0.125, stem="small")
IMAGES = Batch((torch.rand(4, 3, 32, 32), torch.rand(4, 3, 24, 24)), torch.tensor([0, 1, 2, 0]))


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 5)
    )  # fmt: skip


def _gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def _trainer(*words: str) -> Trainer:
    line = "--data d --arch parallel_resnet10 --width-mult 0.125 --stem small --sizes 32 24"
    config, _ = parse(DaliOptions, [*line.split(), "--epochs", "2", "--lr", "0.01", *words])
    resolved = resolve(config, world_size=1, device_type="cpu", has_bf16=False)
    torch.manual_seed(0)
    return make_trainer(resolved, create_model(NETWORK), 3, 4, torch.device("cpu"))


def _update(trainer: Trainer, times: int) -> None:
    for _ in range(times):
        trainer.forward_backward(IMAGES, last=True)
        trainer.update()


@pytest.mark.parametrize("norm_decay", [True, False])
@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_steps_are_timms_with_the_same_parameters_without_decay(opt, norm_decay):
    """timm leaves norm layers and biases without weight decay by default, as --decay weights does."""
    ours, theirs = _net(), _net()
    optimizer = make_optimizer(ours, opt, 0.02, 0.9, 0.3, norm_decay)
    reference = timm.optim.create_optimizer_v2(
        theirs, opt, lr=0.02, weight_decay=0.3, momentum=0.9, filter_bias_and_bn=not norm_decay
    )
    for step in range(5):
        _gradients(ours, step)
        _gradients(theirs, step)
        optimizer.step()
        reference.step()
    for a, b, start in zip(_weights(ours), _weights(theirs), _weights(_net()), strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, start)


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_skipped_updates_leave_no_trace_also_the_first(opt):
    ends = []
    for skipped in ((), (0, 1, 4)):
        model, updates = _net().to(memory_format=torch.channels_last), 0
        optimizer = make_optimizer(model, opt, 0.02, 0.9, 0.3)
        for step in range(4 + len(skipped)):
            is_bad = step in skipped
            _gradients(model, updates)
            updates += not is_bad
            if is_bad:
                for p in model.parameters():
                    p.grad[0] = torch.nan
            optimizer.found_inf = torch.tensor(float(is_bad))
            optimizer.step()
        ends.append(_weights(model))
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_float16s_scaler_skips_and_unscales(opt):
    ends = []
    for scale in (1.0, 1024.0):
        model = _net()
        optimizer = make_optimizer(model, opt, 0.02, 0.9, 0.3)
        scaler = torch.amp.GradScaler("cpu", scale, growth_interval=100)
        for step in range(4):
            _gradients(model, step)
            for p in model.parameters():
                p.grad.mul_(scaler.get_scale())
                if step == 2 and scale > 1:
                    p.grad[0] = torch.inf
            if step == 2 and scale == 1:
                continue
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
        ends.append(_weights(model))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_a_training_goes_on_to_the_bit(opt):
    whole = _trainer("--opt", opt, "--clip-grad", "1")
    _update(whole, 2)
    saved = copy.deepcopy(Checkpoint(NETWORK, **training_state(whole, whole.objective.model)))
    _update(whole, 2)
    again = _trainer("--opt", opt, "--clip-grad", "1")
    again.objective.model.load_state_dict(saved.model)
    assert load_training_state(again, again.objective.model, saved) == []
    again.step = saved.step
    _update(again, 2)
    for a, b in zip(_weights(again.objective), _weights(whole.objective), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_batchnorm_of_a_size_that_joins_late_moves_as_from_the_start(opt):
    """Its moments begin at 0: by another count than its own, a step would be up to six times too large."""
    late, fresh = (ResolutionSwitchable(_net(), (32, 24)) for _ in range(2))
    late.load_state_dict(fresh.state_dict())
    ours, theirs = (make_optimizer(m, opt, 0.02, 0.9, 0.0) for m in (late, fresh))
    (norm,), (other,) = (model.norms_of([24]) for model in (late, fresh))
    for step in range(40):
        late.norms_of([32])[0].weight.grad = torch.ones(8)
        if step >= 30:
            norm.weight.grad = other.weight.grad = torch.full((8,), 0.1)
            theirs.step()
        ours.step()
    # LAMB clips the norm of all gradients; without it, a constant factor changes nothing.
    torch.testing.assert_close(norm.weight, other.weight, rtol=1e-4, atol=1e-5)


def test_lambs_counts_stay_where_they_are_when_a_run_is_resumed():
    """timm's moves them to the CPU, for which a GPU's updates would wait."""
    trainer = _trainer("--opt", "lamb")
    _update(trainer, 2)
    saved = copy.deepcopy(Checkpoint(NETWORK, **training_state(trainer, trainer.objective.model)))
    again = _trainer("--opt", "lamb", "--norm-lr-mult", "2")
    counts = [group["step"] for group in again.optimizer.param_groups]
    assert load_training_state(again, again.objective.model, saved) == []
    for group, count in zip(again.optimizer.param_groups, counts, strict=True):
        assert group["step"] is count
        assert count.tolist() == [2, 2, 2]


def test_an_earlier_versions_single_count_is_not_that_of_a_size_that_waits():
    trainer = _trainer("--opt", "lamb", "--size-schedule", "0:24", "1:all")
    _update(trainer, 3)
    saved = trainer.optimizer.state_dict()
    for group in saved["param_groups"]:
        group["step"] = group["step"].max()
    again = _trainer("--opt", "lamb", "--size-schedule", "0:24", "1:all")
    assert load_optimizer_state(again.optimizer, saved)
    assert [group["step"].tolist() for group in again.optimizer.param_groups] == [[3, 0, 3]] * 2


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_the_state_of_another_optimizer_is_left_out_with_a_note(opt):
    trained = {name: _trainer("--opt", name) for name in ("plain", opt)}
    for before, after in (("plain", opt), (opt, "plain")):
        trainer = trained[before]
        _update(trainer, 1)
        saved = Checkpoint(NETWORK, **training_state(trainer, trainer.objective.model))
        fresh = _trainer("--opt", after)
        (note,) = load_training_state(fresh, fresh.objective.model, saved)
        assert "the optimizer starts without" in note


@pytest.mark.parametrize(("before", "after"), [("off", "fp16"), ("fp16", "off")])
def test_a_training_goes_on_with_float16_and_without(before, after):
    trainer = _trainer("--amp", before)
    saved = Checkpoint(NETWORK, **training_state(trainer, trainer.objective.model))
    again = _trainer("--amp", after)
    assert load_training_state(again, again.objective.model, saved) == []


def test_a_library_that_is_missing_or_too_old_is_named(monkeypatch):
    name = "rsnet.training.timm_optimizers"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "timm", None)
        with pytest.raises(
            ModuleNotFoundError
        ) as error:  # which the command line names with its extra
            importlib.import_module(name)
        assert error.value.name == "timm"
    monkeypatch.delattr(timm.optim.lamb, "lamb")
    with pytest.raises(UsageError, match=r"--opt: timm \S+ is too old"):
        importlib.import_module(name)

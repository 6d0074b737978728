"""`--layer-decay` and `--norm-lr-mult`: timm's factors, steps by hand, and a resume with others."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from pipelines.batch import Batch
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import resolve
from rsnet.config.train_config import TrainConfig, to_plain_dict
from rsnet.models.factory import create_model
from rsnet.models.state_dict import select_sizes
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training import resume
from rsnet.training.lr_scales import lr_scales
from rsnet.training.optim import make_optimizer, param_groups, set_lr
from rsnet.training.state import load_training_state, training_state
from rsnet.training.trainer import Trainer, make_trainer
from tests.helpers import faults

CPU = torch.device("cpu")
NETWORK = ModelConfig("parallel_resnet10", 3, (32, 24), width_mult=0.125, stem="small")
IMAGES = Batch((torch.rand(4, 3, 32, 32), torch.rand(4, 3, 24, 24)), torch.tensor([0, 1, 2, 0]))


def _timms(name: str) -> list[tuple[str, tuple[int, ...], float]]:
    """Name, shape and factor of each parameter of timm's network, in order, by timm."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    found = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.7)
        for p in group["params"]
    }
    return [(n, tuple(p.shape), found[id(p)]) for n, p in model.named_parameters()]


def _ours(arch: str) -> list[tuple[str, tuple[int, ...], float]]:
    """The same of the switchable network, by ordinary names: all copies of a BatchNorm agree."""
    model = create_model(ModelConfig(arch, 10, (64, 48)))
    scales = lr_scales(model, 0.7)
    found: dict[str, tuple[tuple[int, ...], set[float]]] = {}
    for name, p in model.network.named_parameters():
        plain = re.sub(r"\.by_resolution\.\d+", "", name)
        found.setdefault(plain, (tuple(p.shape), set()))[1].add(scales[p])
    return [(name, shape, *scale) for name, (shape, scale) in found.items()]


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("parallel_timm/test_resnet", "test_resnet"),
        ("parallel_timm/test_efficientnet", "test_efficientnet"),
        ("parallel_resnet18", "resnet18"),
    ],
)
def test_factors_are_timms(arch, name):
    """Also of torchvision's ResNets, which have the names of timm's."""
    ours = _ours(arch)
    assert len({scale for *_, scale in ours}) > 4
    assert ours == _timms(name)


@pytest.mark.parametrize(
    ("arch", "more", "stem", "layers"),
    [
        ("parallel_resnet10", {"stem": "small", "blurpool": True}, "conv1", 6),
        ("parallel_resnet18", {"mode": "preact", "qw": 4, "qa": 4}, "conv1", 10),
        ("parallel_mobilenetv2", {"width_mult": 0.25}, "features.0.", 1 + 17 + 1 + 1),
    ],
)
def test_a_layer_is_a_block_from_the_stem_to_the_classifier(arch, more, stem, layers):
    model = create_model(ModelConfig(arch, 10, (64, 48), **more))
    scales = lr_scales(model, 0.5)
    by_name = {name: scales[p] for name, p in model.network.named_parameters()}
    assert set(by_name.values()) == {0.5**i for i in range(layers)}
    classifier = [s for name, s in by_name.items() if name.startswith(("fc", "classifier"))]
    assert classifier == [1.0] * len(classifier) != []
    smallest = {name for name, s in by_name.items() if s == 0.5 ** (layers - 1)}
    assert smallest == {n for n in by_name if n.startswith((stem, stem.replace("conv", "bn")))}
    (alpha,) = (g for g in param_groups(model, 0.1, False, 0.5) if g["params"][0] is model.alpha)
    assert (alpha["lr_scale"], alpha["weight_decay"]) == (1.0, 0.0)


def _small() -> ResolutionSwitchable:
    torch.manual_seed(0)
    return ResolutionSwitchable(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
        ),
        (6,),
    )  # fmt: skip


@pytest.mark.parametrize("mult", [1.0, 3.0])
def test_a_step_of_sgd_by_hand(mult):
    model, rates = _small(), {"0": 0.4 * 0.5**2, "1": 0.4 * 0.5**2 * mult, "2": 0.4 * 0.5, "4": 0.4}
    sgd = make_optimizer(
        model, "plain", 1.0, 0.9, 0.1, norm_decay=False, layer_decay=0.5, norm_lr_mult=mult
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    set_lr(sgd, 0.4)
    sgd.step()
    for name, p in model.named_parameters():
        was = before[name]
        rate = 0.4 if name == "alpha" else rates[name.split(".")[1]]
        expected = was - rate * (1 + 0.1 * was * (p.ndim > 1))
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("opt", ["plain", "nesterov", "adamw", "lamb", "muon"])
def test_each_layer_moves_as_by_its_own_rate(opt):
    """As with that rate for all; LAMB and Muon look at a parameter, or at the gradients of all."""
    one, all_ = _small(), {}
    optimizer = make_optimizer(one, opt, 1.0, 0.9, 0.1, layer_decay=0.5)
    set_lr(optimizer, 0.02)
    for rate in (0.02, 0.01, 0.005):
        all_[rate] = _small()
        plain = make_optimizer(all_[rate], opt, rate, 0.9, 0.1)
        for model, its in ((one, optimizer), (all_[rate], plain)):
            generator = torch.Generator().manual_seed(1)
            if model is one and rate != 0.02:
                continue
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            its.step()
    scales = lr_scales(one, 0.5)
    for name, p in one.named_parameters():
        like = dict(all_[0.02 * scales.get(p, 1.0)].named_parameters())[name]
        torch.testing.assert_close(p, like)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"norm": "shared"},
        {"arch": "parallel_timm/test_efficientnet"},  # a subclass of BatchNorm
        {"mode": "preact", "qw": 4, "qa": 4},
    ],
)
def test_norm_lr_mult_is_of_batchnorm_alone(more):
    config = {"arch": "parallel_resnet18", "num_classes": 3, "sizes": (64, 48)} | more
    model = create_model(ModelConfig(**config))
    scales = lr_scales(model, norm_lr_mult=5)
    by_name = {name: scales[p] for name, p in model.network.named_parameters()}
    assert by_name == {name: 5.0 if ".by_resolution." in name else 1.0 for name in by_name}
    assert set(by_name.values()) == {1.0, 5.0}


def test_with_norm_lr_mult_a_private_batchnorm_moves_as_in_a_network_of_its_size():
    """At half the learning rate, so that the shared weights have the mean of both sizes' gradients."""
    both = _trainer(lr=0.05, norm_lr_mult=2.0, kd=False, warmup=0)
    before = copy.deepcopy(both.objective.model.state_dict())
    both.forward_backward(IMAGES, last=True)
    both.update()
    after = both.objective.model.state_dict()
    for image, size in zip(IMAGES.images, NETWORK.sizes, strict=True):
        alone = _trainer(lr=0.1, kd=False, warmup=0, sizes=(size,))
        alone.objective.model.load_state_dict(select_sizes(before, NETWORK.sizes, (size,)))
        alone.forward_backward(Batch((image,), IMAGES.labels), last=True)
        alone.update()
        ours, started = (select_sizes(state, NETWORK.sizes, (size,)) for state in (after, before))
        for name, p in alone.objective.model.named_parameters():
            if ".by_resolution." in name:
                assert not torch.equal(p, started[name])
                torch.testing.assert_close(ours[name], p.detach())


def _resolve(previous=None, **more):
    sizes = {"arch": "parallel_resnet10", "width_mult": 0.125, "stem": "small", "sizes": (32, 24)}
    config = TrainConfig(**{"data": "d", "epochs": 2, "lr": 0.01} | sizes | more)
    return resolve(config, world_size=1, device_type="cpu", has_bf16=False, previous=previous)


def _trainer(**more) -> Trainer:
    torch.manual_seed(0)
    network = dataclasses.replace(NETWORK, sizes=more.get("sizes", NETWORK.sizes))
    return make_trainer(_resolve(**more), create_model(network), 3, 4, CPU)


def _update(trainer: Trainer, times: int) -> None:
    for _ in range(times):
        trainer.forward_backward(IMAGES, last=True)
        trainer.update()


def _saved(trainer: Trainer) -> Checkpoint:
    state = training_state(trainer, trainer.objective.model)
    return copy.deepcopy(Checkpoint(NETWORK, **state))


def test_a_resume_with_another_decay_keeps_each_parameters_momentum():
    """One has more groups than the other, and several layers have filters of the same shape."""
    one, other = {}, {"layer_decay": 0.5, "norm_lr_mult": 5.0}
    for before, after in ((one, other), (other, one)):
        trained, again = _trainer(**before), _trainer(**after)
        _update(trained, 1)
        assert load_training_state(again, again.objective.model, _saved(trained)) == []
        models = [t.objective.model.named_parameters() for t in (trained, again)]
        for (name, theirs), (_, ours) in zip(*models, strict=True):
            state, saved = again.optimizer.state[ours], trained.optimizer.state[theirs]
            assert torch.equal(state["momentum_buffer"], saved["momentum_buffer"]), name


def test_a_training_goes_on_to_the_bit():
    whole, again = (_trainer(layer_decay=0.5, opt="nesterov") for _ in range(2))
    _update(whole, 2)
    saved = _saved(whole)
    _update(whole, 2)
    again.objective.model.load_state_dict(saved.model)
    assert load_training_state(again, again.objective.model, saved) == []
    again.step = saved.step
    _update(again, 2)
    for a, b in zip(again.objective.parameters(), whole.objective.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_has_its_own_decay_unless_another_is_given():
    before = to_plain_dict(_resolve(layer_decay=0.5))
    assert _resolve(before).layer_decay == 0.5
    assert _resolve({k: v for k, v in before.items() if k != "layer_decay"}).layer_decay == 1
    given = _resolve(before, layer_decay=0.9)
    assert resume.changes(before, to_plain_dict(given)) == ["--layer-decay 0.5 -> 0.9"]
    sizes = {"sizes": [32, 24]}
    assert resume.changes(sizes, {"sizes": [32]}) == ["--sizes 32 24 -> 32"]


@pytest.mark.faults
@pytest.mark.slow
def test_two_processes_train_as_one_with_both_batches(photos, tmp_path):
    for name, ranks, more in (("one", 1, ["--accumulate", "2"]), ("two", 2, [])):
        words = faults.command(
            photos, tmp_path / name, "-b", "2", *more, "--epochs", "1", "--mixup", "0",
            "--layer-decay", "0.5", "--drop-path", "0.3",
        )  # fmt: skip
        faults.finish(words if ranks == 1 else faults.torchrun(2, words))
    one, two = (faults.saved(tmp_path / name)["model"] for name in ("one", "two"))
    for key, value in one.items():
        if "running" not in key and "tracked" not in key:  # each process has its own
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)

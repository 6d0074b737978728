"""The draws of `--drop-path`: their statistics, one for all sizes, exact resume, processes, CUDA graphs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torchvision.ops import stochastic_depth

from pipelines.batch import Batch
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import resolve
from rsnet.config.train_config import TrainConfig, to_plain_dict
from rsnet.models.factory import create_model
from rsnet.models.layers.drop_path import DropPath
from rsnet.training import resume
from rsnet.training.cuda_graph import WARM_UP
from rsnet.training.drop_path import DropPathSampler
from rsnet.training.state import load_training_state, training_state
from rsnet.training.trainer import Trainer, make_trainer
from tests.helpers.cuda_graphs import FakeCuda

CPU = torch.device("cpu")
SIZES = (16, 8)
NETWORK = ModelConfig("parallel_resnet10", 3, SIZES, width_mult=0.125, stem="small")


def _layers(*rates: float) -> torch.nn.ModuleList:
    return torch.nn.ModuleList(map(DropPath, rates))


def _drawn(layers: torch.nn.ModuleList) -> torch.Tensor:
    return torch.stack([layer.factors.clone() for layer in layers])


def test_shares_and_values_are_torchvisions_and_layers_samples_and_steps_independent():
    layers, samples, steps = _layers(0.1, 0.5, 0.5), 500, 40
    sampler = DropPathSampler(layers, samples, 0, 0, 1)
    found = []
    for step in range(steps):
        sampler.draw(step, 0, CPU)
        found.append(_drawn(layers))
    factors = torch.stack(found, 1)  # (layers, steps, samples)
    for rate, own in zip((0.1, 0.5, 0.5), factors, strict=True):
        theirs = stochastic_depth(torch.ones(samples * steps, 1), rate, "row")
        assert set(own.unique().tolist()) == set(theirs.unique().tolist())
        deviation = (rate * (1 - rate) / own.numel()) ** 0.5
        assert (own == 0).double().mean().item() == pytest.approx(rate, abs=5 * deviation)
        assert (theirs == 0).double().mean().item() == pytest.approx(rate, abs=5 * deviation)
    a = (factors == 0).double() - torch.tensor([0.1, 0.5, 0.5]).view(-1, 1, 1)
    pairs = [(a[1], a[2]), (a[0], a[1]), (a[1, 1:], a[1, :-1]), (a[1, :, 1:], a[1, :, :-1])]
    for x, y in pairs:
        correlation = (x * y).mean() / (x.std() * y.std())
        assert abs(correlation) < 5 / x.numel() ** 0.5


def test_what_a_sample_draws_depends_on_its_place_in_the_update_alone():
    """One process with two batches an update, and two processes with one."""
    layers, both = _layers(0.3, 0.6), []
    for batches, ranks in ((2, 1), (1, 2)):
        parts = []
        for batch in range(batches):
            for rank in range(ranks):
                DropPathSampler(layers, 8, 7, rank, ranks).draw(5, batch, CPU)
                parts.append(_drawn(layers))
        both.append(torch.cat(parts, 1))
    assert torch.equal(*both)
    DropPathSampler(layers, 16, 8, 0, 1).draw(5, 0, CPU)
    assert not torch.equal(_drawn(layers), both[0])


def _resolve(previous=None, **more):
    sizes = {"arch": "parallel_resnet10", "width_mult": 0.125, "stem": "small", "sizes": (16, 8)}
    config = TrainConfig(data="d", batch_size=4, epochs=2, lr=0.01, **sizes, **more)
    return resolve(config, world_size=1, device_type="cpu", has_bf16=False, previous=previous)


def _trainer(**more) -> Trainer:
    config = _resolve(drop_path=0.5, **more)
    torch.manual_seed(0)
    model = create_model(NETWORK, drop_path=config.drop_path)
    return make_trainer(config, model, 3, 4, CPU)


def _batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            tuple(torch.randn(4, 3, s, s, generator=generator) for s in SIZES),
            torch.randint(0, 3, (4,), generator=generator),
        )
        for _ in range(count)
    ]


def _update(trainer: Trainer, batches: list[Batch]) -> None:
    trainer.objective.train()
    for i, batch in enumerate(batches, start=1):
        trainer.forward_backward(batch, last=(last := i % trainer.accumulate == 0))
        if last:
            trainer.update()


def test_all_sizes_of_a_sample_go_without_the_same_branches_and_the_next_batch_without_others():
    trainer = _trainer(accumulate=2)
    seen = []
    last = [m for m in trainer.objective.modules() if isinstance(m, DropPath)][-1]
    last.register_forward_hook(lambda _m, _x, y: seen.append((y.flatten(1) != 0).any(1)))
    _update(trainer, _batches(8))
    by_batch = [seen[i : i + len(SIZES)] for i in range(0, len(seen), len(SIZES))]
    assert all(torch.equal(*of_sizes) for of_sizes in by_batch)
    assert len({tuple(of_sizes[0].tolist()) for of_sizes in by_batch}) > 4


def test_a_training_goes_on_to_the_bit_and_asks_no_generator():
    batches = _batches(5)
    whole, again = _trainer(ema=0.9), _trainer(ema=0.9)
    _update(whole, batches[:2])
    saved = copy.deepcopy(Checkpoint(NETWORK, **training_state(whole, whole.objective.model)))
    _update(whole, batches[2:])
    again.objective.model.load_state_dict(saved.model)
    assert load_training_state(again, again.objective.model, saved) == []
    again.step = saved.step
    before = torch.get_rng_state()
    _update(again, batches[2:])
    assert torch.equal(torch.get_rng_state(), before)
    ends = [t.objective.model.state_dict() | t.ema.model.state_dict() for t in (whole, again)]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    plain = create_model(NETWORK).state_dict()
    assert ends[0].keys() == plain.keys()


def test_replayed_updates_draw_as_eager_ones(monkeypatch):
    cuda, ends = FakeCuda(monkeypatch), []
    for cuda_graphs in (False, True):
        trainer = _trainer(lr_decay="schedule", cuda_graphs=cuda_graphs)
        # A graph's rate is a float32.
        object.__setattr__(trainer.schedule, "lr", float(np.float32(trainer.schedule.lr)))
        _update(trainer, _batches(WARM_UP + 3))
        ends.append(trainer.objective.model.state_dict())
    assert [graph.replays for graph in cuda.graphs] == [3]
    for key, value in ends[0].items():
        assert torch.equal(ends[1][key], value), key


def test_a_resumed_run_has_its_own_rate_unless_another_is_given():
    before = to_plain_dict(_resolve(drop_path=0.5))
    assert _resolve(before).drop_path == 0.5
    assert _resolve(before, drop_path=0.0).drop_path == 0
    assert _resolve().drop_path is None
    given = to_plain_dict(_resolve(before, drop_path=0.1))
    assert resume.changes(before, given) == ["--drop-path 0.5 -> 0.1"]

"""What a checkpoint keeps beside the weights: random states, sums that were not logged, the guard's count."""

from __future__ import annotations

import dataclasses

import torch

from pipelines.dali import DaliOptions
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.command_line import parse
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import resolve
from rsnet.models.factory import create_model
from rsnet.training import resume as state
from rsnet.training.trainer import make_trainer

CPU = torch.device("cpu")
NETWORK = ModelConfig("parallel_resnet10", 3, (32, 24), width_mult=0.125, stem="small")


def _trainer(*words: str):
    line = (
        "--data d --arch parallel_resnet10 --width-mult 0.125 --stem small --sizes 32 24 --epochs 2"
    )
    config, _ = parse(DaliOptions, [*line.split(), *words])
    resolved = resolve(config, world_size=1, device_type="cpu", has_bf16=False)
    model = create_model(NETWORK)
    return make_trainer(resolved, model, 3, 4, CPU), model


def test_random_numbers_go_on_where_they_were():
    """Dropout and stochastic depth draw from PyTorch's generator."""
    trainer, model = _trainer()
    torch.manual_seed(3)
    torch.rand(5)
    content = Checkpoint(NETWORK, **state.training_state(trainer, model))
    expected = torch.rand(7)
    torch.manual_seed(0)
    assert state.load_training_state(*_trainer(), content) == []
    assert torch.equal(torch.rand(7), expected)


def test_what_was_not_logged_yet_and_what_was_left_out_go_on():
    trainer, model = _trainer("--on-nonfinite", "skip", "2")
    good, bad = {"ce": torch.tensor(4.0)}, {"ce": torch.tensor(torch.nan)}
    for terms in (good, bad):
        trainer.means.add(terms)
        trainer.guard.check(terms)
        trainer.guard.close(0)
    content = Checkpoint(NETWORK, **state.training_state(trainer, model))
    again, other = _trainer("--on-nonfinite", "skip", "2")
    state.load_training_state(again, other, content)
    assert again.guard.skipped() == 1
    assert again.means.compute() == {"ce": 4}
    for step in (1, 2):
        assert again.guard.verdict() is None
        again.guard.check(bad)
        again.guard.close(step)
    assert again.guard.verdict() == (2, ["ce"])


def test_the_state_of_other_ranks_is_not_taken_for_this_ones():
    trainer, model = _trainer()
    content = Checkpoint(NETWORK, **state.training_state(trainer, model))
    (alone,) = content.ranks
    content = dataclasses.replace(content, ranks=[alone, alone])
    (line,) = state.load_training_state(*_trainer(), content)
    assert line.startswith(
        "2 processes then, 1 now: BatchNorm's statistics go on from those of the first"
    )

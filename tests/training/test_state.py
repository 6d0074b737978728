"""What a checkpoint keeps beside the weights: random states, sums that were not logged, the guard's count."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

from pipelines.batch import Batch
from pipelines.dali import DaliOptions
from pipelines.utils.errors import UsageError
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.command_line import parse
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import resolve
from rsnet.distributed import process_group as distributed
from rsnet.models.factory import create_model
from rsnet.training import state
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
    """Dropout draws from PyTorch's generator."""
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


@pytest.mark.parametrize(("before", "now"), [((), ("--ema", "0.9")), (("--ema", "0.9"), ())])
def test_ranks_go_on_with_averaged_weights_turned_on_or_off(before, now, monkeypatch):
    """Each rank has BatchNorm statistics of its own, and those of the averages behind them."""
    monkeypatch.setattr(state.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(state.distributed, "rank", lambda: 1)
    trainer, model = _trainer(*before)
    for i, buffer in enumerate(model.buffers()):
        buffer.fill_(i)
    content = Checkpoint(NETWORK, **state.training_state(trainer, model))
    content = dataclasses.replace(content, ranks=2 * content.ranks)
    again, other = _trainer(*now)
    assert state.load_training_state(again, other, content) == []
    assert [int(b.flatten()[0]) for b in other.buffers()] == list(range(len([*model.buffers()])))


THERE = {
    "pipeline": "DALI", "samples": 25, "data": "ab12", "seed": 0, "order": "random",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pipeline": "FFCV", "data": "cd34"}, "pipeline DALI -> FFCV"),
        ({"samples": 24, "data": "cd34"}, "samples 25 -> 24"),
        ({"data": "cd34"}, "as many images as before, but others (names, order, labels or sizes)"),
        ({"order": "quasi-random"}, "order random -> quasi-random"),
        ({"data": "cd34", "seed": 3}, "others (names, order, labels or sizes); seed 0 -> 3"),
        (
            {"pipeline": None, "data": "cd34"},  # as in a checkpoint of version 0.1
            "others (names, order, labels or sizes), or another pipeline reads them",
        ),
    ],
)
def test_other_data_at_a_resume_are_told_in_words(changed, message):
    there = {k: v for k, v in THERE.items() if changed.get(k, "") is not None}
    here = THERE | {k: v for k, v in changed.items() if v is not None}
    config, _ = parse(DaliOptions, ["--data", "d", "--arch", "parallel_resnet10"])
    resolved = resolve(config, world_size=1, device_type="cpu", has_bf16=False)
    loader = mock.Mock(state_dict=lambda: here)
    checkpoint = Checkpoint(NETWORK, {}, global_batch=8, loader=there)
    with pytest.raises(UsageError) as error:
        state.restore_position(checkpoint, resolved, loader, 8, 1)
    assert f"{message}: the run would not go on with the images that come next" in str(error.value)
    assert "ab12" not in str(error.value)


@pytest.mark.parametrize(("words", "static"), [((), True), (("--accumulate", "2"), False)])
def test_ddp_takes_no_graph_for_static_whose_reduction_is_left_out(monkeypatch, words, static):
    given = {}
    monkeypatch.setattr(
        distributed, "wrap_ddp", lambda objective, *_, **more: given.update(more) or objective
    )
    _trainer(*words)
    assert given["static"] is static


def test_each_rank_mixes_by_draws_of_its_own(monkeypatch):
    images = (torch.rand(4, 3, 32, 32), torch.rand(4, 3, 24, 24))
    batch, labels = Batch(images, torch.tensor([0, 1, 2, 0])), []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        labels.append(_trainer("--mixup", "0.2")[0].mix(batch, 0).labels)
    assert not torch.equal(*labels)

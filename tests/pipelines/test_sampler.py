"""Order, crops and flips: functions of (seed, epoch, sample index) alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from pipelines import synthetic
from pipelines.batch import LoaderSpec
from pipelines.sampler import Schedule, ScheduledLoader, crop_params, uniforms
from pipelines.utils.errors import UsageError


def test_a_samples_numbers_do_not_depend_on_its_batch():
    together = uniforms(7, 2, np.array([3, 1, 4]), 9)
    alone = uniforms(7, 2, np.array([4]), 9)
    assert np.array_equal(together[2:], alone)


def test_lanes_can_be_asked_for_from_any_first_one():
    indices = np.array([3, 1, 4])
    assert np.array_equal(
        uniforms(7, 2, indices, 4, first_lane=5), uniforms(7, 2, indices, 9)[:, 5:]
    )


@pytest.mark.parametrize("changed", [(8, 2, 3), (7, 3, 3), (7, 2, 4)])
def test_seed_epoch_and_index_each_give_other_numbers(changed):
    seed, epoch, index = changed
    a = uniforms(7, 2, np.array([3]), 64)
    b = uniforms(seed, epoch, np.array([index]), 64)
    assert abs(np.corrcoef(a[0], b[0])[0, 1]) < 0.4
    assert not np.isclose(a, b).any()


def test_numbers_are_uniform_and_uncorrelated():
    numbers = uniforms(0, 0, np.arange(20000), 6)
    assert 0 <= numbers.min() < numbers.max() < 1
    # Mean and variance of a uniform number, five standard errors wide.
    assert np.abs(numbers.mean(axis=0) - 1 / 2).max() < 5 * math.sqrt(1 / 12 / 20000)
    assert np.abs(numbers.var(axis=0) - 1 / 12).max() < 5 * math.sqrt(1 / 180 / 20000)
    between_lanes = np.corrcoef(numbers.T) - np.eye(6)
    between_neighbours = np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]
    assert max(np.abs(between_lanes).max(), abs(between_neighbours)) < 5 / math.sqrt(20000)


def test_half_of_the_flips_are_flips():
    flips = crop_params(0, 0, np.arange(4000), 5, "independent").flip
    assert np.abs(flips.mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(4000)
    assert not (flips == flips[:, :1]).all()
    shared = crop_params(0, 0, np.arange(100), 5, "shared").flip
    assert (shared == shared[:, :1]).all()


def test_every_rank_gets_its_slice_of_one_global_order():
    whole = list(Schedule(103, 12, 0, 1, seed=5, training=True).batches(epoch=4))
    parts = [list(Schedule(103, 4, r, 3, seed=5, training=True).batches(epoch=4)) for r in range(3)]
    for step, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([p[step] for p in parts]), batch)
    seen = np.concatenate(whole)
    assert len(set(seen)) == len(seen) == 96


def test_the_rest_that_is_left_out_differs_by_epoch():
    schedule = Schedule(10, 4, 0, 1, seed=0, training=True)
    left_out = [set(range(10)) - set(np.concatenate(list(schedule.batches(e)))) for e in range(5)]
    assert len({frozenset(s) for s in left_out}) > 1


def test_an_order_is_drawn_once_for_all_that_read_from_it_and_kept_no_longer(monkeypatch):
    drawn, draw = [], Schedule.order
    monkeypatch.setattr(
        Schedule, "order", lambda self, epoch: drawn.append(epoch) or draw(self, epoch)
    )
    schedule = Schedule(103, 4, 0, 2, seed=5, training=True)
    batches, reads = list(schedule.batches(3)), schedule.reads_of([0, 1], 3)
    assert drawn == [3]
    expected = np.random.default_rng((5, 3)).permutation(103)[:96]
    assert reads.what.tolist() == expected.tolist()
    assert np.concatenate(batches).tolist() == reads.what[reads.own].tolist()
    del batches
    next(schedule.batches(3))
    assert drawn == [3, 3]


def test_each_seed_and_each_epoch_has_an_order_of_its_own():
    orders = [
        Schedule(103, 4, 0, 1, seed, training=True).order(epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_images_are_repeated_as_timm_repeats_them(ranks, monkeypatch):
    repeats, batch = 3, 24 // ranks
    for rank in range(ranks):
        schedule = Schedule(103, batch, rank, ranks, seed=5, training=True, repeats=repeats)
        order = torch.from_numpy(schedule.order(2))
        monkeypatch.setattr(torch, "randperm", lambda *_, order=order, **__: order)
        theirs = list(
            RepeatAugSampler(range(103), ranks, rank, num_repeats=repeats, selected_round=0)
        )
        batches = list(schedule.batches(2))
        assert len(batches) == 103 // 24
        for step, indices in enumerate(batches):
            rows = schedule.rows(indices).tolist()
            assert sorted(rows) == sorted(theirs[step * batch :][:batch])
            assert len(set(indices.tolist())) == batch  # a crop of its own for each
            assert all(a != b for a, b in zip(rows, rows[-1:] + rows[:-1], strict=True))


def test_the_repeated_samples_of_a_step_do_not_depend_on_the_processes():
    def steps(ranks: int) -> list[set[int]]:
        parts = [
            Schedule(103, 12 // ranks, r, ranks, seed=5, training=True, repeats=3).batches(4)
            for r in range(ranks)
        ]
        return [set(np.concatenate(p).tolist()) for p in zip(*parts, strict=True)]

    assert steps(1) == steps(2) == steps(3)
    assert len(set.union(*steps(1))) == 96


def test_a_run_is_not_resumed_with_another_number_of_repetitions():
    def loader(repeats: int) -> ScheduledLoader:
        spec = LoaderSpec(Path(), (8,), 4, torch.device("cpu"), repeats=repeats)
        return synthetic.make_loaders(synthetic.SyntheticOptions(12, 1, 2), spec).train

    with pytest.raises(UsageError, match="order random, this run's random, 3 of an image"):
        loader(3).load_state_dict(loader(1).state_dict())

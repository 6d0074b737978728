"""Quasi-random orders, of pages and of shards: what an epoch has, who reads it, and how well it mixes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.batch import LoaderSpec
from pipelines.dali.options import DaliOptions
from pipelines.sampler import Schedule
from pipelines.utils.errors import UsageError
from pipelines.windows import Windows, WindowSchedule, source_schedule

SIZES = (37, 50, 21, 44, 60, 33, 48, 52, 29, 41)  # samples of ten shards
SHARD = np.random.default_rng(0).permutation(np.repeat(np.arange(10), SIZES))
SAMPLES = len(SHARD)


def schedule(batch=6, rank=0, nodes=(0,), window=3, shard=SHARD, seed=5, **more):
    """Of one rank of the ranks on these nodes."""
    source = SimpleNamespace(shard=shard, labels=None, place="data", __len__=lambda: len(shard))
    source = type("Data", (), vars(source) | {"__len__": lambda _: len(shard)})()
    spec = LoaderSpec(
        Path(), (8,), batch, torch.device("cpu"), seed=seed, rank=rank, world_size=len(nodes),
        node_of_rank=tuple(nodes), **more,
    )  # fmt: skip
    return source_schedule(spec, source, training=True, window=window)


def steps_of(nodes, batch=6, epoch=2, **more) -> list[list[np.ndarray]]:
    """The batches of every rank."""
    return [list(schedule(batch, rank, nodes, **more).batches(epoch)) for rank in range(len(nodes))]


def plain(epoch: int, node: int, nodes: int, window: int, seed: int = 5) -> list[int]:
    """A node's order, written with lists."""
    rng = np.random.default_rng((seed, epoch))
    shuffled = rng.permutation(10).tolist()
    number = rng.random(SAMPLES).tolist()
    line = []
    for place in range(10):
        (shard,) = (s for s in range(10) if shuffled[s] == place)
        line += sorted((i for i in range(SAMPLES) if SHARD[i] == shard), key=lambda i: number[i])
    own = line[node * (SAMPLES // nodes) : (node + 1) * (SAMPLES // nodes)]
    shards = list(dict.fromkeys(int(SHARD[i]) for i in own))
    order: list[int] = []
    for first in range(0, len(shards), window):
        mixed = [i for i in own if SHARD[i] in shards[first : first + window]]
        order += sorted(mixed, key=lambda i: number[i])
    return order


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 3, 99])
def test_a_node_reads_its_run_of_the_shuffled_shards_window_by_window(nodes, window):
    for node in range(nodes):
        of_rank = schedule(6, node, range(nodes), window)
        for epoch in (0, 3):
            assert of_rank.order(epoch).tolist() == plain(epoch, node, nodes, window)


def test_pages_and_the_shards_of_one_node_have_one_order():
    pages = WindowSchedule(SAMPLES, 6, 0, 1, 5, training=True, windows=Windows(SHARD + 7, 3))
    assert pages.order(2).tolist() == schedule().order(2).tolist() == plain(2, 0, 1, 3)
    assert pages.order_text == "quasi-random"


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_an_epoch_has_each_sample_once_but_for_a_rest_that_changes(nodes, repeats):
    left_out = []
    for epoch in range(3):
        ranks = steps_of(range(nodes), epoch=epoch, repeats=repeats)
        assert {len(batches) for batches in ranks} == {SAMPLES // (6 * nodes)}
        seen = np.concatenate([np.concatenate(batches) for batches in ranks]).tolist()
        assert len(set(seen)) == len(seen) == SAMPLES // (6 * nodes) * 6 * nodes
        left_out.append(frozenset(range(SAMPLES)) - {i % SAMPLES for i in seen})
    assert len(set(left_out)) == 3
    if repeats == 1:
        assert {len(rest) for rest in left_out} == {SAMPLES % (6 * nodes)}


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("nodes", [(0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)])
def test_a_nodes_steps_do_not_depend_on_its_processes(nodes, repeats):
    """However the ranks lie on the nodes, as Slurm may distribute them."""
    alone = steps_of((0, 1), batch=12, repeats=repeats)
    ranks = steps_of(nodes, batch=6, repeats=repeats)
    for node in (0, 1):
        own = [rank for rank in range(4) if nodes[rank] == node]
        for step, expected in enumerate(alone[node]):
            parts = np.concatenate([ranks[rank][step] for rank in own])
            assert sorted(parts.tolist()) == sorted(expected.tolist())
            if repeats == 1:
                assert parts.tolist() == expected.tolist()


def test_nodes_share_no_shard_but_those_on_their_borders():
    for epoch in range(4):
        shards = [set(SHARD[np.concatenate(b)].tolist()) for b in steps_of((0, 1, 2), epoch=epoch)]
        assert [len(shards[i] & shards[j]) <= 1 for i, j in ((0, 1), (1, 2))] == [True, True]
        assert not shards[0] & shards[2]
        assert max(map(len, shards)) <= 6  # of ten, for a third of the samples


def test_no_more_than_a_window_of_shards_is_open_at_once():
    (batches,) = steps_of((0,), window=3)
    shards = SHARD[np.concatenate(batches)]
    first = {s: int(np.flatnonzero(shards == s)[0]) for s in set(shards.tolist())}
    last = {s: int(np.flatnonzero(shards == s)[-1]) for s in first}
    is_open = [sum(first[s] <= i <= last[s] for s in first) for i in range(len(shards))]
    assert max(is_open) == 3


def test_every_sample_comes_at_any_time_and_beside_any_other():
    """Over epochs as in a uniform shuffle: the mean place, its variance, and which shards share a window."""
    epochs = 600
    places = np.empty((epochs, SAMPLES))
    windows = np.zeros((10, 10))
    one = schedule()
    for epoch in range(epochs):
        order = one.order(epoch)
        places[epoch, order] = (np.arange(SAMPLES) + 0.5) / SAMPLES
        shards = list(dict.fromkeys(SHARD[order].tolist()))
        for first in range(0, 10, 3):
            windows[np.ix_(shards[first : first + 3], shards[first : first + 3])] += 1
    assert np.abs(places.mean(0) - 1 / 2).max() < 5 * math.sqrt(1 / 12 / epochs)
    assert np.abs(places.var(0) - 1 / 12).max() < 5 * math.sqrt(1 / 180 / epochs)
    # Three windows of three pairs and one of none, of 45 pairs.
    together = windows[~np.eye(10, dtype=bool)] / epochs
    assert np.abs(together - 9 / 45).max() < 5 * math.sqrt(0.2 * 0.8 / epochs)


def test_batches_have_as_many_samples_of_each_shard_of_their_window_as_chance_gives():
    """Mean and variance of the hypergeometric distribution: within a window the shuffle is uniform."""
    shard = np.repeat(np.arange(32), 100)
    one = schedule(40, window=8, shard=shard)
    firsts = [shard[one.order(epoch)[:40]] for epoch in range(300)]
    counts = np.array([np.bincount(first, minlength=32) for first in firsts])
    of_window = counts[counts.any(1)]
    present = 300 * 8
    assert abs(of_window.sum() / present - 40 / 8) < 1e-9
    expected = 40 * (1 / 8) * (7 / 8) * (800 - 40) / (800 - 1)
    variance = ((of_window - 5.0) ** 2).sum() - 25 * (of_window.size - present)
    assert abs(variance / present - expected) < 5 * expected * math.sqrt(2 / present)


def test_the_order_changes_with_the_nodes_and_with_what_lies_in_which_shard():
    one, others = schedule(), [
        schedule(nodes=(0, 1)), schedule(window=4), schedule(shard=np.roll(SHARD, 1)),
    ]  # fmt: skip
    assert one.order_text.startswith("shards, 3 of 10 at a time (")
    assert others[0].order_text.startswith("shards, 3 of 10 at a time on 2 nodes (")
    assert len({one.order_text, *(other.order_text for other in others)}) == 4
    assert schedule(nodes=(0, 0)).order_text == schedule(shard=SHARD + 3).order_text
    assert schedule(nodes=(0, 0)).order_text == one.order_text


def test_validation_and_the_random_order_know_no_windows():
    assert type(schedule(window=None)) is Schedule


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"nodes": (0, 0, 1)},
            "--order shards: nodes have 1 to 2 processes; start as many on each",
        ),
        ({"balanced_sampling": True}, "--balanced-sampling: with --order random alone"),
        ({"batch": 500}, "--batch-size: one step takes 500 images"),
    ],
)
def test_what_cannot_be_ordered_by_shards_is_said(more, message):
    with pytest.raises(UsageError, match=message):
        schedule(**more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order_window": 4}, "--order-window: add --order shards"),
        ({"order": "shards", "order_window": 0}, "--order-window 0: 1 to 1000000 shards"),
    ],
)
def test_a_window_that_means_nothing_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        DaliOptions(**options)

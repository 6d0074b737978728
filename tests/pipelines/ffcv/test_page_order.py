"""The quasi-random order: a permutation that works through the file by groups of pages."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.ffcv import loader as page_order
from pipelines.ffcv.loader import PageSchedule

PAGES = np.repeat(np.arange(7, 37), 10)  # 30 pages of 10 samples, not from page 0 on


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr(page_order, "GROUP", 4)


def _order(epoch=0, seed=0):
    return PageSchedule(300, 10, 0, 1, seed, training=True, pages=PAGES).order(epoch)


def test_each_sample_comes_once():
    np.testing.assert_array_equal(np.sort(_order()), np.arange(300))


def test_a_group_of_pages_is_finished_before_the_next_begins():
    groups = np.split(PAGES[_order()], range(40, 300, 40))
    seen = [set(group.tolist()) for group in groups]
    assert [len(s) for s in seen] == [4] * 7 + [2]
    assert len(set.union(*seen)) == 30


def test_samples_are_shuffled_within_a_group():
    pages = PAGES[_order()][:40]
    assert (np.diff(pages) != 0).sum() > 20
    assert not np.array_equal(np.sort(_order()[:40]), _order()[:40])


def test_pages_come_in_an_order_of_their_own_each_epoch_and_seed():
    first = {(e, s): set(PAGES[_order(e, s)][:40].tolist()) for e, s in [(0, 0), (1, 0), (0, 1)]}
    assert first[0, 0] != first[1, 0]
    assert first[0, 0] != first[0, 1]
    np.testing.assert_array_equal(_order(3), _order(3))

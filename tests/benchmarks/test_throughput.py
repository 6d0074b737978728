"""What the benchmarks compare is set up as a training is."""

from __future__ import annotations

import pytest
import torch

from benchmarks.throughput import (
    SIDES,
    Options,
    device_in_use,
    make_batches,
    make_step,
    ratios,
)
from rsnet.distributed.device import time_convolutions


def test_cudnn_times_its_algorithms_for_both_sides_as_in_a_training(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    device_in_use()
    assert torch.backends.cudnn.benchmark
    time_convolutions(deterministic=True)
    assert not torch.backends.cudnn.benchmark


@pytest.mark.slow
def test_all_ways_to_write_a_step_have_the_same_losses_and_make_the_same_update():
    o = Options(sizes=(64, 48), batch_size=4, amp="off")
    (batch,) = make_batches(o, 1)
    steps = {which: make_step(which, "parallel_resnet18", o) for which in SIDES}
    losses = {which: [step(batch), step(batch)] for which, step in steps.items()}
    for which in ("modern", "ours"):
        assert losses[which] == pytest.approx(losses["plain"], rel=1e-4)


def test_a_ratio_is_that_of_each_round():
    slow_machine = 10.0  # in the second round
    beside, ours = [3.0, 3.0 * slow_machine, 4.0], [2.0, 2.0 * slow_machine, 1.0]
    assert ratios(beside, ours) == {"median": 1.5, "from": 1.5, "to": 4.0}

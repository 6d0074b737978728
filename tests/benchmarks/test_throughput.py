"""What the benchmarks compare is set up as a training is."""

from __future__ import annotations

import torch

from benchmarks.throughput import device_in_use
from rsnet.distributed.device import time_convolutions


def test_cudnn_times_its_algorithms_for_both_sides_as_in_a_training(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    device_in_use()
    assert torch.backends.cudnn.benchmark
    time_convolutions(deterministic=True)
    assert not torch.backends.cudnn.benchmark

"""How many cores a loader takes where nothing else is said."""

from __future__ import annotations

import os

import pytest
import torch

from pipelines.dali import DaliOptions
from pipelines.ffcv import FfcvOptions


@pytest.mark.parametrize("options", [DaliOptions, FfcvOptions])
@pytest.mark.parametrize(
    ("gpus", "cores", "workers"),
    [(0, 64, 4), (0, 1, 4), (1, 8, 8), (1, 64, 16), (8, 96, 12), (8, 224, 16), (8, 4, 1)],
)
def test_workers_are_a_gpus_share_of_the_processs_cores(monkeypatch, options, gpus, cores, workers):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    assert options().workers == workers
    assert options(workers=7).workers == 7

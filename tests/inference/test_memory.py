"""The peak of a computation's memory, against tensors of known sizes."""

from __future__ import annotations

import pytest
import torch

from rsnet.inference import memory

MEGABYTE = 2**20


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
            ],
        ),
    ],
)
def test_the_peak_is_what_lies_there_at_once_more_than_before(device):
    before = torch.empty(50 * MEGABYTE, dtype=torch.uint8, device=device)

    def computation() -> None:
        one = torch.empty(4 * MEGABYTE, dtype=torch.uint8, device=device)
        two = torch.empty(2 * MEGABYTE, dtype=torch.uint8, device=device)
        del one
        three = torch.empty(3 * MEGABYTE, dtype=torch.uint8, device=device)
        del two, three

    assert memory.peak_bytes(computation, before.device) == 6 * MEGABYTE

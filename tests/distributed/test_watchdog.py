"""Which errors are taken for the loss of another process."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from pipelines.utils.errors import DataError, RunError
from rsnet.distributed.watchdog import is_collective_error


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_an_error_that_names_a_file_or_an_option_is_not_the_loss_of_a_process():
    lost = "Connection closed by peer"
    assert is_collective_error(RuntimeError(lost))
    assert not is_collective_error(RuntimeError("shape mismatch"))
    for kind in (DataError, RunError):  # a path may have any of the words in it
        assert not is_collective_error(kind("broken image /mnt/store/train/a.JPEG"))


def test_alone_there_is_no_process_to_lose():
    assert not is_collective_error(RuntimeError("Connection closed by peer"))

"""Which errors are taken for the loss of another process."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from pipelines.utils.errors import DataError, RunError
from rsnet.distributed.watchdog import is_collective_error

LOST = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:5"
)
LATE = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms"
)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _raised(error: RuntimeError, module: str) -> RuntimeError:
    """The error as a function of that module raises it."""
    scope = {"__name__": module, "error": error}
    with pytest.raises(type(error)) as end:
        exec("def call():\n    raise error\ncall()", scope)
    return end.value


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("words", [LOST, LATE])
@pytest.mark.parametrize(
    ("module", "is_theirs"),
    [
        ("torch.distributed.distributed_c10d", True),
        ("torch.nn.parallel.distributed", True),
        ("torch.autograd.graph", True),
        ("rsnet.distributed.process_group", True),
        ("pipelines.dali.loader", False),
        ("torch.nn.functional", False),
    ],
)
def test_gloos_error_is_a_loss_where_processes_do_something_together(words, module, is_theirs):
    assert is_collective_error(_raised(RuntimeError(words), module)) is is_theirs


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "name", ["DistError", "DistBackendError", "DistNetworkError", "DistStoreError"]
)
def test_an_error_of_torch_distributed_is_a_loss_whatever_it_says(name):
    assert is_collective_error(_raised(getattr(dist, name)("x"), "pipelines.dali.loader"))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "words",
    ["shape mismatch", "cannot restore the state", "no peer", "socket", "Connection closed by peer",
     "open(/mnt/store/gloo/a.JPEG) timed out", "NCCL"],
)  # fmt: skip
def test_words_alone_are_no_loss(words):
    for module in ("torch.distributed.distributed_c10d", "pipelines.dali.loader"):
        assert not is_collective_error(_raised(RuntimeError(words), module))
    for kind in (DataError, RunError):  # of gloo's words, too
        assert not is_collective_error(_raised(kind(LOST), "torch.distributed.distributed_c10d"))


def test_alone_there_is_no_process_to_lose():
    for error in (RuntimeError(LOST), dist.DistNetworkError("x")):
        assert not is_collective_error(_raised(error, "torch.distributed.distributed_c10d"))

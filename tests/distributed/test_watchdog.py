"""Which errors are taken for the loss of another process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from pipelines.utils.errors import DataError, RunError
from rsnet.distributed.watchdog import Watchdog, is_collective_error

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


def _watchdogs(ranks: int) -> list[Watchdog]:
    """Those of as many ranks, which tell each other in one store; none watches by itself."""
    store, found = dist.HashStore(), []
    for rank in range(ranks):
        dog = Watchdog(8, lambda _: None)  # asks for 3 s
        dog._store, dog._rank = store, rank
        dog._others = [r for r in range(ranks) if r != rank]
        dog._tell()
        found.append(dog)
    return found


def _asked_together(dogs: list[Watchdog]) -> list[str]:
    """What each says at the same time, as all run into the same timeout."""
    together = threading.Barrier(len(dogs))

    def ask(dog: Watchdog) -> str:
        together.wait()
        return dog._who()

    with ThreadPoolExecutor(len(dogs)) as threads:
        return list(threads.map(ask, dogs))


def test_ranks_that_ask_at_the_same_time_do_not_take_each_other_for_lost():
    *asking, _silent = _watchdogs(4)
    lines = _asked_together(asking)
    assert lines == ["rank 3 ended, hung, or lost the connection"] * 3


def test_the_rank_that_has_no_data_is_behind_those_that_wait_for_it():
    dogs = _watchdogs(3)
    for rank in (0, 2):
        dogs[rank].tick()  # their batches arrived
    lines = _asked_together(dogs)
    assert (
        lines[0]
        == lines[2]
        == "no progress of rank 1, which still runs: is the loading of data stuck?"
    )
    assert lines[1] == "rank 1 itself does not go on: its data?"

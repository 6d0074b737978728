import ctypes
import resource
from pathlib import Path

import pytest
import torch

from rsnet.distributed import process_group
from rsnet.distributed.device import keep_freed_memory
from rsnet.inference.classifier import SwitchableClassifier
from tests.helpers import releases
from tests.helpers.processes import holds_in_fork

LIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
BLOCK, USED = 1 << 30, 64 << 20  # bytes; larger than what tests before may have left in the heap


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return releases.write(tmp_path_factory.mktemp("device") / "release")


@pytest.mark.parametrize(
    ("set_up", "kept"),
    [
        (lambda _: keep_freed_memory(torch.device("cpu")), True),
        (lambda _: process_group.setup("cpu"), True),
        (SwitchableClassifier.load, True),
        (lambda _: keep_freed_memory(torch.device("cuda")), False),
    ],
    ids=["called", "process_group", "classifier", "gpu"],
)
@pytest.mark.skipif(not hasattr(LIBC, "mallopt"), reason="only for glibc's malloc")
def test_memory_that_is_freed_stays_with_a_process_that_computes_on_the_cpu(set_up, kept, folder):
    def check() -> bool:
        torch.set_num_threads(1)  # a fork has none of OpenMP's, and would wait for them
        LIBC.mallopt(M_MMAP_MAX, 65536)  # glibc's defaults, whatever ran before
        LIBC.mallopt(M_TRIM_THRESHOLD, 128 << 10)
        set_up(folder)
        LIBC.malloc.restype = ctypes.c_void_p
        before = resident()
        block = LIBC.malloc(ctypes.c_size_t(BLOCK))
        LIBC.memset(ctypes.c_void_p(block + BLOCK - USED), 1, ctypes.c_size_t(USED))
        LIBC.free(ctypes.c_void_p(block))
        return (resident() - before > USED / 2) == kept

    assert holds_in_fork(check)

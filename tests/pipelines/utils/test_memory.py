"""Too little memory: refused at the start, and said in a line later."""

from __future__ import annotations

import resource

import pytest
import torch

from pipelines.utils import memory
from pipelines.utils.cli import Verb, exit_code, exit_if_not_installed, run_verb
from pipelines.utils.errors import UsageError


@pytest.fixture
def limit(monkeypatch, tmp_path):
    """Limit the address space and the cgroup to so many bytes, as far as the code can see."""

    def set_to(addresses: float | None, cgroup: str) -> None:
        soft = resource.RLIM_INFINITY if addresses is None else int(addresses)
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
        (tmp_path / "memory.max").write_text(cgroup)
        files = (tmp_path / "none", tmp_path / "memory.max")
        monkeypatch.setattr(memory, "CGROUP_FILES", files)

    return set_to


@pytest.mark.parametrize(
    ("addresses", "cgroup", "message"),
    [
        (4.4e9, "max\n", "the address space is limited to 4.4 GB, 5 GB are needed"),
        (None, "300000000\n", "the container or job is limited to 0.3 GB, 0.7 GB are needed"),
    ],
)
def test_a_training_is_refused_where_it_cannot_start(limit, capsys, addresses, cgroup, message):
    limit(addresses, cgroup)
    with pytest.raises(UsageError, match=message):
        memory.require_memory()
    assert run_verb("rsnet train", Verb("no.such.module", "", trains=True), []) == 2
    with pytest.raises(SystemExit) as end, exit_if_not_installed("train_dali.py", "train"):
        raise AssertionError("nothing is imported")
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(message in line for line in lines)


@pytest.mark.parametrize(
    ("addresses", "cgroup"), [(None, "max\n"), (64e9, "9223372036854771712\n")]
)
def test_enough_memory_is_nothing_to_speak_of(limit, addresses, cgroup):
    limit(addresses, cgroup)
    memory.require_memory()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("std::bad_alloc"),
        ImportError("libtorch_cuda.so: failed to map segment from shared object"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"
        ),
        RuntimeError("can't start new thread"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_memory_that_runs_out_is_one_line(limit, capsys, error):
    limit(8e9, "max")

    def run() -> int:
        raise error

    assert exit_code("name", run) == 1
    err = capsys.readouterr().err
    assert err.startswith("name: error: ")
    assert err.count("\n") == 1
    assert "allocate memory" in err or "(limits: ulimit -v 8.0 GB); lower --batch-size" in err


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ImportError("cannot import x")])
def test_a_fault_of_the_program_is_not_taken_for_a_lack_of_memory(error):
    def run() -> int:
        raise error

    with pytest.raises(type(error)):
        exit_code("name", run)

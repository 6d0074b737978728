"""Too little memory as a one-line error: from the limits, before a start that cannot succeed, or from an
exception.
"""

from __future__ import annotations

import math
import resource
from pathlib import Path

from pipelines.utils.errors import UsageError, first_line

# What a training takes on a CPU before its first image. With less, libraries abort instead of raising: seen
# with limits of 4.4 GB (torch 2.15, DALI 2.4, two threads; 3.5 GB of it are the libraries' code).
LEAST_ADDRESSES, LEAST_MEMORY = 5e9, 0.7e9

CGROUP_FILES = (  # of versions 2 and 1, as a container sees its own
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)

# What the loader of libraries, torch's allocator on a CPU, Python's threads, C++ and ONNX Runtime say.
WORDS = ("failed to map segment", "annot allocate memory", "can't allocate memory",
         "can't start new thread", "bad_alloc", "Failed to allocate memory")  # fmt: skip
# What CUDA and its libraries say, in errors for which torch has no type.
GPU_WORDS = ("CUDA out of memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


def require_memory() -> None:
    """Raise UsageError if this process is limited to less than a training needs to start."""
    addresses, memory = _limits()
    if addresses < LEAST_ADDRESSES:
        raise UsageError(
            f"too little memory: the address space is limited to {addresses / 1e9:.1f} GB, "
            f"{LEAST_ADDRESSES / 1e9:g} GB are needed to start; raise it by ulimit -v"
        )
    if memory < LEAST_MEMORY:
        raise UsageError(
            f"too little memory: the container or job is limited to {memory / 1e9:.1f} GB, "
            f"{LEAST_MEMORY / 1e9:g} GB are needed to start; give it more"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is no memory left, of the CPU or of a GPU."""
    if isinstance(error, MemoryError) or is_out_of_gpu_memory(error):
        return True
    return any(word in str(error) for word in WORDS)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU has no memory left."""
    # By its name, as not all that read this module have torch.
    is_torchs = type(error).__name__ == "OutOfMemoryError"
    return is_torchs or any(word in str(error) for word in GPU_WORDS)


def memory_line(error: BaseException) -> str:
    """Return such an error in one line, with the limits of this process."""
    addresses, memory = _limits()
    known = [
        f"{what} {limit / 1e9:.1f} GB"
        for what, limit in (("ulimit -v", addresses), ("container or job", memory))
        if limit < 1e15  # version 1 writes 2^63 for none
    ]
    limits = f" (limits: {', '.join(known)})" if known else ""
    return f"too little memory: {first_line(error)}{limits}; lower --batch-size or --workers"


def _limits() -> tuple[float, float]:
    """Return the bytes that this process may address, and those that its cgroup may use."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    found = [math.inf]
    for path in CGROUP_FILES:
        try:
            found.append(float(path.read_text()))
        except (OSError, ValueError):  # no such version, or "max"
            continue
    return math.inf if soft == resource.RLIM_INFINITY else float(soft), min(found)

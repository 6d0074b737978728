"""CPU cores of this process, and how many of them a loader takes."""

from __future__ import annotations

import os

# The most that one GPU is likely to need, which has not been measured yet; and where there is none.
MAX_WORKERS, WORKERS_WITHOUT_GPU = 16, 4


def default_workers() -> int:
    """Return the threads of a loader: this process's cores over this machine's GPUs, from 1 to 16; or 4.

    Processes that a launcher starts, one a GPU, have the same cores.
    """
    import torch  # options are read without it

    gpus = torch.cuda.device_count()
    if not gpus:
        return WORKERS_WITHOUT_GPU
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // gpus))

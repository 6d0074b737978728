"""How much memory a computation takes beside what lies there before."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(computation: Callable[[], object], device: torch.device) -> int:
    """The most that PyTorch's tensors take at once, more than before, while `computation` runs on `device`.

    Libraries' own memory is left out. On a GPU other threads' tensors count, too.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        computation()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Else it tells when it starts and stops, and that there is no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        computation()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    return int(max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]"))

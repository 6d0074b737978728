"""Precision that a device supports, how it is set up, and memory that it has used."""

from __future__ import annotations

import torch


def time_convolutions(*, deterministic: bool = False) -> None:
    """Let cuDNN time its algorithms for each shape, as there are few: a training, and its benchmarks.

    deterministic: take the same algorithm in every run.
    """
    torch.backends.cudnn.benchmark = not deterministic


def has_bf16(device: torch.device) -> bool:
    """Return whether the device computes bfloat16 itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # The oldest torch that is supported may not have it.
    can: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def peak_memory_gb(device: torch.device) -> float | None:
    """Return the most GB that tensors took on a GPU since its statistics were reset; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None

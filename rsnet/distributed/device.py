"""Device helpers: bfloat16 support, cuDNN and allocator settings, peak memory, CUDA graph errors."""

from __future__ import annotations

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def time_convolutions(*, deterministic: bool = False) -> None:
    """Let cuDNN time its algorithms for each shape, as there are few: a training, and its benchmarks.

    deterministic: take the same algorithm in every run.
    """
    torch.backends.cudnn.benchmark = not deterministic


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep the memory that tensors free, for the next ones, if it computes on the CPU.

    glibc returns large blocks to the kernel, which maps and clears their pages anew for every activation: in
    a forward of MobileNetV2 with 32 images of 224 pixels, 300,000 page faults and half of the time. The
    process stays as large as it once was. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type == "cpu" and mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def has_bf16(device: torch.device) -> bool:
    """Return whether the device computes bfloat16 itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # The oldest torch that is supported may not have it.
    can: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def capture_error(error: RuntimeError) -> RuntimeError:
    """Return the error that broke the capture of a CUDA graph: ending that fails, too, and says less."""
    return error.__context__ if isinstance(error.__context__, RuntimeError) else error


def peak_memory_gb(device: torch.device) -> float | None:
    """Return the most GB that tensors took on a GPU since its statistics were reset; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None

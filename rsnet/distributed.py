"""Processes and devices. The only reader of RANK, LOCAL_RANK and WORLD_SIZE, which torchrun sets."""

from __future__ import annotations

import os
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.errors import UsageError

Device = Literal["auto", "cpu", "cuda"]


def setup(device: Device) -> torch.device:
    """Join the process group, if torchrun started us, and return this process's device.

    Raises UsageError for --device cuda without a GPU, or with fewer GPUs than processes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: process {local_rank} has no GPU of its own "
            f"(there are {torch.cuda.device_count()}); start fewer processes or use --device cpu"
        )
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo")
    return chosen


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def wrap(objective: nn.Module, device: torch.device, all_used: bool = True) -> nn.Module:
    """DDP around `objective` where there are several processes.

    Buffers are not broadcast in every step: in training BatchNorm's statistics are each rank's own.
    `share_buffers` makes them rank 0's, which are evaluated and saved. `all_used` is False if a step
    may leave out parameters, which DDP then has to look for.
    """
    if not dist.is_initialized():
        return objective
    return nn.parallel.DistributedDataParallel(
        objective,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=not all_used,
    )


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over ranks, on all of them; a new tensor."""
    return _all_reduce(value, dist.ReduceOp.SUM)


def all_reduce_max(value: Tensor) -> Tensor:
    """The maximum over ranks, on all of them; a new tensor."""
    return _all_reduce(value, dist.ReduceOp.MAX)


def _all_reduce(value: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value, op)
    return value

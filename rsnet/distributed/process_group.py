"""Processes and devices. The only reader of RANK, LOCAL_RANK and WORLD_SIZE, which torchrun sets."""

from __future__ import annotations

import atexit
import gc
import os
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from pipelines.utils.errors import DataError, RunError, UsageError, first_line, os_error_line
from rsnet.distributed.device import keep_freed_memory
from rsnet.distributed.rendezvous import integer_variable, open_store

Device = Literal["auto", "cpu", "cuda"]
T = TypeVar("T")
MOST = 1 << 20  # processes

# For what the hosts have to agree on, beside the devices: gloo, whatever the gradients go through.
_control: Any = None
_nodes: tuple[int, ...] = (0,)  # of each rank


def setup(device: Device, timeout_s: float = 600.0) -> torch.device:
    """Join the process group, if torchrun started us, and return this process's device.

    timeout_s: how long one process waits for another.

    Raises UsageError for --device cuda without a GPU, or with fewer GPUs than processes, and for environment
    variables that are missing or wrong; RunError if the processes do not find each other.
    """
    own, world = _place()
    local_rank = integer_variable("LOCAL_RANK", range(MOST)) if os.environ.get("LOCAL_RANK") else 0
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: process {local_rank} has no GPU of its own "
            f"(there are {torch.cuda.device_count()}); start fewer processes, use --device cpu, or leave "
            "LOCAL_RANK unset if each process is shown no GPU but its own"
        )
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    keep_freed_memory(chosen)
    if os.environ.get("WORLD_SIZE") and not dist.is_initialized():
        # Twice as long as the watchdog waits, which can name the rank that is late.
        _join(own, world, chosen.type, timedelta(seconds=2 * timeout_s))
    return chosen


def _join(own: int, world: int, device_type: str, timeout: timedelta) -> None:
    """Set up the process group and `_control`. Raises as `setup`."""
    global _control, _nodes
    try:
        store = open_store(own, world, timeout)
        # Before the groups: one rank with gloo and another with NCCL would wait for each other.
        _require_same_device(store, own, world, device_type)
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=world, timeout=timeout)
        _control = dist.new_group(backend="gloo", timeout=timeout)
        _nodes = _numbered(all_gather_object(_node_name()))
    except (UsageError, RunError):
        raise
    except (RuntimeError, ValueError) as error:  # errors of the store are RuntimeErrors, too
        raise RunError(
            f"rank {own} cannot connect to the other processes: {first_line(error)}; "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network"
        ) from error


def _require_same_device(store: Any, own: int, world: int, kind: str) -> None:
    """Raise UsageError, on all ranks, if one computes on a GPU and another does not."""
    store.set(f"device/{own}", f"{kind} {socket.gethostname()}")
    if own == 0:
        found = [store.get(f"device/{rank}").decode().split(" ", 1) for rank in range(world)]
        others = (rank for rank, (other, _) in enumerate(found) if other != kind)
        other = next(others, None)
        line = "" if other is None else (
            f"--device: rank {other} (on {found[other][1]}) computes on {found[other][0]}, rank 0 (on "
            f"{found[0][1]}) on {kind}: mend the machine without GPUs, or give all --device cpu"
        )  # fmt: skip
        store.set("device", line)
    if line := store.get("device").decode():
        raise UsageError(line)


def _place() -> tuple[int, int]:
    """Return this process's rank and the number of processes, as torchrun sets them; 0 and 1 alone."""
    if not os.environ.get("WORLD_SIZE"):
        if os.environ.get("RANK"):
            raise UsageError("RANK is set, but WORLD_SIZE is not: set or unset both")
        return 0, 1
    world = integer_variable("WORLD_SIZE", range(1, MOST))
    return integer_variable("RANK", range(world)), world


def _node_name() -> str:
    """Return an identifier shared only by the processes of a node: torchrun's or Slurm's node number, or
    the host name.
    """
    return os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or socket.gethostname()


def _numbered(names: Sequence[str]) -> tuple[int, ...]:
    """Return a number for each name, from 0, in the order in which they first come."""
    places = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return tuple(places[name] for name in names)


def shutdown(code: int = 0) -> None:
    """Leave the process group, once nothing is trained with it any more, and end its threads.

    A gloo thread may release its last tensor late; if Python is shutting down by then, the process aborts
    (2 of 60 runs on two busy cores, torch 2.15). Only the destructor joins the threads.

    code: the exit code of an error. NCCL leaves only together with all ranks, and those that did not meet
    the error wait for this one's gradients: then the process ends with Python, and NCCL is not asked.
    """
    global _control, _nodes
    if not dist.is_initialized():
        return
    if code and dist.get_backend() == "nccl":
        atexit.register(_end, code)  # after the error was printed
        return
    dist.destroy_process_group()
    _control, _nodes = None, (0,)
    gc.collect()  # DDP, which is part of a cycle, has the group too


def _end(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk; a closed stream
            stream.flush()
    os._exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def node_of_rank() -> tuple[int, ...]:
    """Return the number of the node of each rank, from 0."""
    return _nodes


def is_distributed() -> bool:
    """Return whether a launcher started us, if only as the single process: gradients then go through DDP."""
    return dist.is_initialized()


def is_main() -> bool:
    return rank() == 0


def run_on_main(action: Callable[[], T]) -> T:
    """Return on all ranks what `action` returns on rank 0, or raise there what it raises for the user."""
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None]
    if is_main():
        outcome = [_attempt(action)]
    dist.broadcast_object_list(outcome, 0, group=_control)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    result: T = outcome[0]
    return result


def _attempt(action: Callable[[], T]) -> T | UsageError | DataError | RunError:
    """Return the result, or the error that the user is told."""
    try:
        return action()
    except (UsageError, DataError, RunError) as error:
        return error
    except OSError as error:
        return DataError(os_error_line(error))


def run_on_all(action: Callable[[], T]) -> T:
    """Return what `action` returns, on each rank. If it fails on one, all fail, instead of waiting for it."""
    outcome = _attempt(action) if dist.is_initialized() else action()
    errors = all_gather_object(
        outcome if isinstance(outcome, UsageError | DataError | RunError) else None
    )
    if isinstance(outcome, UsageError | DataError | RunError):
        raise outcome
    for other, error in enumerate(errors):
        if error is not None:
            raise type(error)(f"rank {other}: {error}")
    return outcome


def all_gather_object(value: T) -> list[T]:
    """Return the value of every rank, on all of them."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def gather_object(value: T) -> list[T]:
    """Return the value of every rank on rank 0; nothing on the others."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, group=_control)
    return values or []


class StepVote:
    """Ranks agree on a number, once a step, without waiting for it: the largest of the step before.

    A signal reaches the ranks at different steps; that they stop at the same one costs one step more.
    """

    def __init__(self) -> None:
        self._sum = torch.zeros((), dtype=torch.int64)
        self._pending: Any = None

    def cast(self, number: int) -> int:
        """Vote, and return the largest number of all ranks' last calls; alone, `number` itself."""
        if not dist.is_initialized():
            return number
        agreed = self.count()
        self._sum = torch.tensor(number)
        self._pending = dist.all_reduce(self._sum, dist.ReduceOp.MAX, group=_control, async_op=True)
        return agreed

    def count(self) -> int:
        """Return the outcome of the last call, which all ranks ask for together; 0 if there is none."""
        if self._pending is None:
            return 0
        self._pending.wait()
        self._pending = None
        return int(self._sum)


def wrap_ddp(
    objective: nn.Module,
    device: torch.device,
    all_used: bool = True,
    static: bool = True,
    compress: bool = False,
) -> nn.Module:
    """Return DDP around `objective` where there are several processes.

    Buffers are not broadcast in every step: in training BatchNorm's statistics are each rank's own, as
    with the original. `broadcast_buffers` makes them rank 0's, which are evaluated and saved.

    all_used: False if a step may leave out parameters, which DDP then has to look for, on the host.
    static: whether all steps are alike. compress: reduce gradients in bfloat16, half the traffic.
    """
    if not dist.is_initialized():
        return objective
    with warnings.catch_warnings():
        # torch 2.15 has another name for broadcast_buffers, which torch 2.11 has not.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = nn.parallel.DistributedDataParallel(
            objective,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=not all_used,
            static_graph=all_used and static,
        )
    if compress:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum over ranks, on all of them; a new tensor."""
    return _all_reduce(value, dist.ReduceOp.SUM)


def all_reduce_max(value: Tensor) -> Tensor:
    """Return the maximum over ranks, on all of them; a new tensor."""
    return _all_reduce(value, dist.ReduceOp.MAX)


def _all_reduce(value: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value, op)
    return value

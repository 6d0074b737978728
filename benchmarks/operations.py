"""Count the operations and the peak memory of a training step, without a device.

    python -m benchmarks.operations --batch-size 256

Nothing is computed: the tensors have no numbers (fake tensors). Operations are those of PyTorch that
forward, losses, backward and optimizer call; views and allocations are left out, as they start no kernel on a
GPU, which waits for the host if it is done with few images sooner than the host starts its kernels. Memory is
what tensors hold at most, besides weights, momentum and the batch, and without the scratch of kernels. Prints
one JSON object per network: `benchmarks.plain`, and in bfloat16 `benchmarks.modern` and this trainer.
"""

from __future__ import annotations

import json
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.options import command
from benchmarks.throughput import Options as Workload
from benchmarks.throughput import (
    make_model,
    make_network,
    modern_step,
    our_step,
    plain_step,
    require_known,
    trainer_of,
)
from pipelines.batch import Batch
from rsnet.models.layers.onednn_workarounds import DepthwiseConv2d

ALLOCATIONS = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclass(frozen=True)
class Options:
    arch: tuple[str, ...] = ("parallel_resnet18", "parallel_resnet50", "parallel_mobilenetv2")
    """ResNets and MobileNetV2."""

    batch_size: int = 256
    """Images a step."""

    most: int = 8
    """Kinds of operations that are listed by name."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by name, and the bytes of the tensors that they made and that are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()
        self.peak = 0
        self._bytes = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "aten" and not func.is_view and name not in ALLOCATIONS:
            self.count[name] += 1
        result = func(*args, **(kwargs or {}))
        given = {id(t) for t in tree_leaves((args, kwargs))}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and id(made) not in given and not func.is_view:
                self._add(made.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known[storage] = True
            self._bytes += storage.nbytes()
            self.peak = max(self.peak, self._bytes)
            weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, count: int) -> None:
        self._bytes -= count


def measure(arch: str, o: Options) -> dict[str, Any]:
    found: dict[str, Any] = {"arch": arch}
    workload = Workload(batch_size=o.batch_size, amp="bf16")
    networks = {
        "plain": make_network(arch),
        "modern": make_network(arch).to(memory_format=torch.channels_last),
        "ours": make_model(arch, workload),
    }
    for which, network in networks.items():
        # The loss that a step returns is a number that nobody knows.
        with FakeTensorMode(
            shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True
        ) as mode:
            forget_numbers(network, mode)
            step = step_of(which, network, arch, workload)
            batch = Batch(
                tuple(torch.empty(o.batch_size, 3, s, s) for s in workload.sizes),
                torch.zeros(o.batch_size, dtype=torch.int64),
            )
            step(batch)  # momentum is there from now on
            with Watch() as watch:
                step(batch)
        found[which] = {
            "operations": watch.count.total(),
            "most": dict(watch.count.most_common(o.most)),
            "peak_memory_mb": round(watch.peak / 1e6),
        }
    return found


def step_of(which: str, network: Any, arch: str, workload: Workload) -> Callable[[Batch], float]:
    if which == "plain":
        return plain_step(network, workload)
    if which == "modern":
        return modern_step(network, workload, torch.bfloat16)
    return our_step(trainer_of(network, arch, workload, "bf16"))


def forget_numbers(network: nn.Module, mode: FakeTensorMode) -> None:
    """Let its parameters and buffers have a shape and a type alone, and its layers be a GPU's, in place."""
    for module in network.modules():
        if isinstance(module, DepthwiseConv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]  # which it is but on a CPU
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(mode.from_tensor(parameter.detach())))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, mode.from_tensor(buffer))


def run(o: Options) -> int:
    require_known(o.arch)
    # Copying a layer looks whether it has memory.
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    for arch in o.arch:
        print(json.dumps(measure(arch, o), indent=2), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command("operations", Options, run))

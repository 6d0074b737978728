"""The least time that a training step can take on a GPU: a calculation, from bytes and FLOPs of every layer.

    python -m benchmarks.roofline --batch-size 128

A kernel takes the longer of its bytes at the memory's speed and its FLOPs at the tensor cores'; a step is the
sum over its kernels, forward and backward, at every size. Activations and their gradients are bfloat16. A
kernel reads what it needs and writes what it makes once, whatever the caches hold. The ways:

- eager: each layer by itself. BatchNorm reads its input twice (statistics, result), its backward reads input
  and gradient twice. An activation and a sum are passes of their own. Where a block's input goes two ways,
  its two gradients are summed by a pass;
- compiled: activation, sum and BatchNorm's second pass are one pass, and the sum of the two gradients is
  part of the pass that needs it. The activation's mask is read from its output;
- fused: BatchNorm, sum and activation as compiled in forward. Backward computes the mask anew from
  BatchNorm's input, or reads the output if there was a sum. The gradients' sums are passes of their own.

CUDA graphs change no byte: they remove the launches. "Launched" is how many images a second the host can
start the kernels for, if nothing else holds it up; a step takes the longer of the two. Prints, for each
network, a table of layer kinds and a line for each way.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from benchmarks.options import command
from benchmarks.throughput import make_network, require_known
from pipelines.utils.tables import text_table
from rsnet.models.factory import WeightsOnMeta

Way = Literal["eager", "compiled", "fused"]
WAYS: tuple[Way, ...] = ("eager", "compiled", "fused")
Kind = Literal["convolution", "BatchNorm", "activation", "sum", "pooling", "classifier", "weights"]
SUMS = (operator.add, operator.iadd)
POOLS = (F.adaptive_avg_pool2d,)
BYTES = 2  # of a bfloat16
INDEX_BYTES = 8  # of the position that max pooling keeps for its backward, int64
# Of a parameter, once a step, float32: SGD reads weight, gradient, momentum, writes two; the weight is cast.
UPDATE_BYTES = 20 + 6


@dataclass(frozen=True)
class Options:
    arch: tuple[str, ...] = ("parallel_resnet50", "parallel_resnet18", "parallel_mobilenetv2")
    """ResNets and MobileNetV2."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Input sizes."""

    batch_size: int = 128
    """Images a step."""

    terabytes_per_s: float = 3.0
    """Of the GPU's memory: a copy's, of an H100."""

    teraflops: float = 790.0
    """Of a large matrix product in bfloat16."""

    reached: float = 0.8
    """Share of the two that kernels are expected to reach."""

    launch_us: float = 5.0
    """What the host takes to start a kernel, in eager PyTorch."""


class Kernel(NamedTuple):
    kind: Kind
    backward: bool
    bytes: float
    flops: float = 0.0


class Shapes(fx.Interpreter):
    """Elements of what every layer of a network makes of a batch (N, 3, s, s), which has no numbers."""

    def __init__(self, network: nn.Module, batch_size: int, size: int) -> None:
        super().__init__(fx.symbolic_trace(network))
        self.elements: dict[fx.Node, int] = {}
        self.run(torch.empty(batch_size, 3, size, size, device="meta"))

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.elements[n] = result.numel()
        return result


class Step:
    """The kernels of forward and backward at one size."""

    def __init__(self, shapes: Shapes, way: Way) -> None:
        self._shapes, self._way = shapes, way
        self._absorbed: set[fx.Node] = set()  # by the BatchNorm before them

    def kernels(self) -> Iterator[Kernel]:
        for node in self._shapes.module.graph.nodes:  # type: ignore[union-attr]
            if node.op in ("placeholder", "output"):
                continue
            yield from self._kernels_of(node)
            if len(node.users) > 1:  # its gradients are summed
                passes = 1 if self._way == "compiled" else 3
                yield _passes("sum", True, passes * self._shapes.elements[node])

    def _kernels_of(self, node: fx.Node) -> Iterator[Kernel]:
        layer = self._layer(node)
        made = self._shapes.elements[node]
        read = self._shapes.elements[node.all_input_nodes[0]]
        if isinstance(layer, nn.Conv2d | nn.Linear):
            is_first = node.all_input_nodes[0].op == "placeholder"
            yield from _product(layer, read, made, needs_input_gradient=not is_first)
        elif isinstance(layer, nn.BatchNorm2d):
            yield from self._norm(node, made)
        elif node in self._absorbed:
            return
        elif isinstance(layer, nn.ReLU | nn.ReLU6):
            yield _passes("activation", False, 2 * made)
            yield _passes("activation", True, 3 * made)
        elif isinstance(layer, nn.MaxPool2d):
            indices = INDEX_BYTES * made
            yield Kernel("pooling", False, BYTES * (read + made) + indices)
            yield Kernel("pooling", True, BYTES * (read + made) + indices)
        elif isinstance(layer, nn.AdaptiveAvgPool2d) or node.target in POOLS:
            yield _passes("pooling", False, read + made)
            yield _passes("pooling", True, read + made)
        elif node.target in SUMS:
            yield _passes("sum", False, 3 * made)

    def _norm(self, node: fx.Node, made: int) -> Iterator[Kernel]:
        tail = [] if self._way == "eager" else self._tail(node)
        self._absorbed |= set(tail)
        has_sum = any(n.target in SUMS for n in tail)
        has_activation = any(isinstance(self._layer(n), nn.ReLU | nn.ReLU6) for n in tail)
        yield _passes("BatchNorm", False, made)  # statistics
        yield _passes("BatchNorm", False, (2 + has_sum) * made)
        for passes in self._norm_backward(has_sum, has_activation):
            yield _passes("BatchNorm", True, passes * made)

    def _norm_backward(self, has_sum: bool, has_activation: bool) -> tuple[int, int]:
        """How often two kernels read or write: one for the sums over channels, one for the gradients."""
        if not has_activation:
            return 2, 3
        if (
            self._way == "compiled"
        ):  # the first writes the masked gradient, which is also the other summand's
            return 4, 3
        return (3, 5) if has_sum else (2, 3)

    def _tail(self, node: fx.Node) -> list[fx.Node]:
        """The sum and the activation that alone use a BatchNorm's output."""
        tail = []
        user = _only_user(node)
        if user and user.target in SUMS and user not in self._absorbed:
            tail.append(user)
            user = _only_user(user)
        if user and isinstance(self._layer(user), nn.ReLU | nn.ReLU6):
            tail.append(user)
        return tail

    def _layer(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module":
            return None
        return self._shapes.module.get_submodule(str(node.target))


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _passes(kind: Kind, backward: bool, elements: float) -> Kernel:
    return Kernel(kind, backward, BYTES * elements)


def _product(
    layer: nn.Conv2d | nn.Linear, read: int, made: int, needs_input_gradient: bool
) -> Iterator[Kernel]:
    """A convolution or matrix product, the gradient of its input, and that of its weight."""
    kind: Kind = "convolution" if isinstance(layer, nn.Conv2d) else "classifier"
    weights = layer.weight.numel()
    product = _passes(kind, False, read + weights + made)
    # An output element takes a row of the weight: channels of its group x kernel.
    flops = 2.0 * made * weights / layer.weight.shape[0]
    yield product._replace(flops=flops)
    yield from [product._replace(backward=True, flops=flops)] * (1 + needs_input_gradient)


def kernels_of_step(network: nn.Module, o: Options) -> dict[Way, list[Kernel]]:
    """Those of all sizes and of the update, by the way. network: on the meta device."""
    # The gradients of all sizes, each bfloat16, become one of float32.
    sums = BYTES * len(o.sizes) + 4
    parameters = sum(p.numel() for p in network.parameters())
    update = Kernel("weights", True, (UPDATE_BYTES + sums) * parameters)
    shapes = [Shapes(network, o.batch_size, size) for size in o.sizes]
    return {way: [*(k for s in shapes for k in Step(s, way).kernels()), update] for way in WAYS}


def seconds(kernels: Sequence[Kernel], o: Options) -> float:
    memory, compute = 1e12 * o.terabytes_per_s, 1e12 * o.teraflops
    return sum(max(k.bytes / memory, k.flops / compute) for k in kernels)


def table(kernels: Sequence[Kernel], o: Options) -> str:
    """Of an image: bytes, FLOPs and time of each kind of layer, forward and backward."""
    rows = []
    for kind in dict.fromkeys(k.kind for k in kernels):
        for backward in (False, True):
            these = [k for k in kernels if (k.kind, k.backward) == (kind, backward)]
            if these:
                rows.append(
                    [f"{kind}, {'backward' if backward else 'forward'}", *_figures(these, o)]
                )
    rows.append(["all", *_figures(kernels, o)])
    return text_table(["an image, all sizes", "MB", "GFLOP", "us"], rows, left=(0,))


def _figures(kernels: Sequence[Kernel], o: Options) -> list[str]:
    n = o.batch_size
    mega, giga = (sum(k.bytes for k in kernels) / 1e6, sum(k.flops for k in kernels) / 1e9)
    return [f"{mega / n:.1f}", f"{giga / n:.1f}", f"{1e6 * seconds(kernels, o) / n:.1f}"]


def run(o: Options) -> int:
    require_known(o.arch)
    print(
        f"calculated: {o.terabytes_per_s} TB/s, {o.teraflops:g} TFLOP/s, {o.batch_size} images a step"
    )
    for arch in o.arch:
        with WeightsOnMeta():
            network = make_network(arch).to("meta").eval()
        kernels = kernels_of_step(network, o)
        print(f"\n{arch}, eager\n{table(kernels['eager'], o)}")
        rows = []
        for way in WAYS:
            bound = o.batch_size / seconds(kernels[way], o)
            bytes_of_image = sum(k.bytes for k in kernels[way]) / o.batch_size / 1e6
            launched = o.batch_size / (1e-6 * o.launch_us * len(kernels[way]))
            speeds = [bound, o.reached * bound, len(kernels[way]), launched]
            rows.append([way, f"{bytes_of_image:.0f}", *(f"{speed:.0f}" for speed in speeds)])
        titles = [arch, "MB an image", "images/s at most", f"at {100 * o.reached:.0f} %"]
        titles += ["kernels a step", "images/s launched"]
        print(f"\n{text_table(titles, rows, left=(0,))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command("roofline", Options, run))

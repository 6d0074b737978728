"""What ways to compute a training step cost beside the trainer's default, on random images.

    python -m benchmarks.step_ways --arch parallel_resnet50 --batch-size 256

They alternate, step by step, in one run; the ratio of their medians is the figure to trust. Peak memory is
known of a GPU alone. Prints one JSON object per network. The ways:

- default: as `train_dali.py` does it;
- pixels together: the 1 x 1 convolutions of all sizes as one matrix product over concatenated pixels; the
  weights of the others are cast by each size;
- recompute norm, recompute blocks, compile: the options of these names;
- compile, graphs: `torch.compile` with CUDA graphs of its own, of the forward and of the backward;
- cuda graphs, and compile, cuda graphs: the option `--cuda-graphs`, alone and with `--compile`;
- fused bn, and fused bn, cuda graphs: the option `--fused-bn`, alone and with `--cuda-graphs`;
- graph: forwards, losses and backward as one CUDA graph, without the optimizer;
- graph, streams: that, with every size but the largest on a stream of its own.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from benchmarks.options import command
from benchmarks.throughput import Options as Workload
from benchmarks.throughput import device_in_use, make_batches, make_ours, require_known
from pipelines.batch import Batch
from pipelines.utils.errors import UsageError
from rsnet.models.autocast import autocast, cast_weights_once
from rsnet.models.layers.fused_batchnorm import convert_to_fused_batchnorm
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.profiler import step_profiler as profile
from rsnet.training import cuda_graph
from rsnet.training.trainer import Trainer

Step = Callable[[], None]
Way = Literal[
    "default", "pixels together", "recompute norm", "recompute blocks", "compile", "compile, graphs",
    "cuda graphs", "compile, cuda graphs", "fused bn", "fused bn, cuda graphs", "graph", "graph, streams",
]  # fmt: skip
NEEDS_GPU = re.compile("graph|fused")
WARM_UP = 3  # steps before a capture, and before any is counted


@dataclass(frozen=True)
class Options:
    arch: tuple[str, ...] = ("parallel_resnet18", "parallel_resnet50", "parallel_mobilenetv2")
    """ResNets and MobileNetV2."""

    ways: tuple[Way, ...] = ()
    """Those beside the default; none: all that the device has."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Input sizes."""

    batch_size: int = 16
    """Images a step."""

    rounds: int = 8
    """Steps of each that are counted."""


def measure(arch: str, o: Options) -> dict[str, Any]:
    # One batch, whose memory the graphs read.
    batch = in_the_trainers_precision(make_batches(workload(o), 1)[0], arch, o)
    on_gpu = batch.labels.device.type == "cuda"
    usual, memory = prepare("default", arch, o, batch)
    found: list[dict[str, Any]] = [{"way": "default", "peak_memory_mb": memory}]
    for way in o.ways or [
        w for w in WAYS if w != "default" and (on_gpu or not NEEDS_GPU.search(w))
    ]:
        step, memory = prepare(way, arch, o, batch)
        beside, taken = alternate([usual, step], o.rounds, batch.labels.device)
        found.append(
            {
                "way": way,
                "images_per_s": round(o.batch_size / taken, 2),
                "time_over_default": round(taken / beside, 3),
                "peak_memory_mb": memory,
            }
        )
        del step  # a graph keeps the memory of a whole step
        gc.collect()
        torch.cuda.empty_cache()
    return {"arch": arch, "ways": found}


def alternate(steps: Sequence[Step], rounds: int, device: torch.device) -> list[float]:
    """Return the median seconds of each way, measured alternately."""
    taken: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, seconds in zip(steps, taken, strict=True):
            start = time.perf_counter()
            step()
            profile.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]


def prepare(way: Way, arch: str, o: Options, batch: Batch) -> tuple[Step, int | None]:
    """Return the warmed-up step and its peak memory, with weights, gradients and momentum."""
    device = batch.labels.device
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    recompute = way.removeprefix("recompute ") if way.startswith("recompute") else "off"
    trainer, model = make_ours(arch, workload(o, recompute), "auto")
    trainer.objective.train()
    step = WAYS[way](trainer, model, batch)
    for _ in range(WARM_UP):
        step()
    if device.type != "cuda":
        return step, None
    torch.cuda.synchronize(device)
    return step, round((torch.cuda.max_memory_allocated(device) - before) / 1e6)


def default(trainer: Trainer, _model: ResolutionSwitchable, batch: Batch) -> Step:
    def step() -> None:
        trainer.forward_backward(batch, last=True)
        trainer.update()

    return step


def compiled(trainer: Trainer, model: ResolutionSwitchable, batch: Batch) -> Step:
    trainer.objective.compile(dynamic=False)
    return default(trainer, model, batch)


def compiled_graphs(trainer: Trainer, model: ResolutionSwitchable, batch: Batch) -> Step:
    trainer.objective.compile(dynamic=False, mode="reduce-overhead")
    step = default(trainer, model, batch)

    def marked() -> None:
        # The tensors of the step before may be overwritten.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        step()

    return marked


def pixels_together(trainer: Trainer, model: ResolutionSwitchable, batch: Batch) -> Step:
    together = AllSizesTogether(model.network)

    def forward_all(images: Sequence[Tensor], _sizes: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(together.run(list(images)))

    model.forward_all = forward_all  # type: ignore[method-assign, assignment]
    return default(trainer, model, batch)


def fused_bn(trainer: Trainer, model: ResolutionSwitchable, batch: Batch) -> Step:
    convert_to_fused_batchnorm(model.network)
    return default(trainer, model, batch)


def fused_bn_cuda_graphs(trainer: Trainer, model: ResolutionSwitchable, batch: Batch) -> Step:
    convert_to_fused_batchnorm(model.network)
    return cuda_graphs(trainer, model, batch)


def graph(trainer: Trainer, _model: ResolutionSwitchable, batch: Batch) -> Step:
    """The gradients lie where the capture put them, and every replay writes them anew."""
    replay = capture(trainer, batch)

    def step() -> None:
        replay()
        trainer.optimizer.step()

    return step


def cuda_graphs(trainer: Trainer, model: ResolutionSwitchable, batch: Batch) -> Step:
    """The capture is in the warm-up."""
    trainer.graphs = cuda_graph.UpdateGraphs(
        trainer.optimizer, trainer.scaler, trainer.device, print
    )
    step = default(trainer, model, batch)
    for _ in range(cuda_graph.WARM_UP):
        step()
    return step


def compiled_cuda_graphs(trainer: Trainer, model: ResolutionSwitchable, batch: Batch) -> Step:
    trainer.objective.compile(dynamic=False)
    return cuda_graphs(trainer, model, batch)


def graph_with_streams(trainer: Trainer, model: ResolutionSwitchable, batch: Batch) -> Step:
    streams = [torch.cuda.Stream() for _ in model.sizes[1:]]  # type: ignore[no-untyped-call]

    def forward_all(images: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, ...]:
        main = torch.cuda.current_stream()
        with cast_weights_once(model._layers, len(sizes)) as begin:
            for stream in streams:
                stream.wait_stream(main)  # for the weights, which are cast there
            begin(0)
            logits = [model(images[0], sizes[0])]
            for number, (stream, x) in enumerate(zip(streams, images[1:], strict=True), start=1):
                begin(number)
                with torch.cuda.stream(stream):
                    logits.append(model(x, sizes[number]))
        for stream, value in zip(streams, logits[1:], strict=True):
            main.wait_stream(stream)
            value.record_stream(main)  # else its memory is the stream's again, once it is let go
        return tuple(logits)

    model.forward_all = forward_all  # type: ignore[method-assign, assignment]
    return graph(trainer, model, batch)


def capture(trainer: Trainer, batch: Batch) -> Step:
    """Forwards, losses and backward as one graph that reads `batch`."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            default(trainer, trainer.objective.model, batch)()  # type: ignore[arg-type]
    torch.cuda.current_stream().wait_stream(side)
    del trainer.optimizer.found_inf  # type: ignore[attr-defined]
    trainer.optimizer.zero_grad(set_to_none=True)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        with autocast(trainer.device, trainer.amp):
            terms = trainer.objective(batch.images, batch.labels, None)
        terms["total"].backward()
    return captured.replay


WAYS: dict[Way, Callable[[Trainer, ResolutionSwitchable, Batch], Step]] = {
    "default": default,
    "pixels together": pixels_together,
    "recompute norm": default,
    "recompute blocks": default,
    "compile": compiled,
    "compile, graphs": compiled_graphs,
    "cuda graphs": cuda_graphs,
    "compile, cuda graphs": compiled_cuda_graphs,
    "fused bn": fused_bn,
    "fused bn, cuda graphs": fused_bn_cuda_graphs,
    "graph": graph,
    "graph, streams": graph_with_streams,
}


class AllSizesTogether(fx.Interpreter):
    """Layer by layer, each on all sizes; a 1 x 1 convolution as one matrix product."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(fx.GraphModule(network, _Tracer().trace(network)))
        self._network = network

    def run_node(self, n: fx.Node) -> Any:
        """Every node's value is a list with one entry per size."""
        if n.op == "placeholder":
            return super().run_node(n)
        if n.op == "output":
            return self.env[n.args[0]]  # type: ignore[index]
        args = [self.env[a] if isinstance(a, fx.Node) else a for a in n.args]
        count = len(next(a for a in args if isinstance(a, list)))
        each = [[a[i] if isinstance(a, list) else a for a in args] for i in range(count)]
        if n.op == "call_module":
            name = str(n.target)
            layers = [
                self._network.get_submodule(name.replace(".by_resolution.0", f".by_resolution.{i}"))
                for i in range(count)
            ]
            if is_product(layers[0]):
                return product(layers[0], args[0])  # type: ignore[arg-type]
            return [layer(*a) for layer, a in zip(layers, each, strict=True)]
        call: Any = n.target
        if n.op == "call_method":
            return [getattr(a[0], call)(*a[1:], **n.kwargs) for a in each]
        return [call(*a, **n.kwargs) for a in each]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.ReLU6) or super().is_leaf_module(
            m, module_qualified_name
        )


def is_product(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Conv2d and (*layer.kernel_size, *layer.stride, layer.groups) == (1,) * 5
    )


def product(conv: nn.Conv2d, xs: Sequence[Tensor]) -> list[Tensor]:
    """S x (N, C, h, w), channels-last -> S x (N, C', h, w), channels-last."""
    pixels = [x.permute(0, 2, 3, 1) for x in xs]
    rows = [p.reshape(-1, p.shape[-1]) for p in pixels]
    together = F.linear(torch.cat(rows), conv.weight.flatten(1), conv.bias)
    out = torch.split(together, [len(r) for r in rows])
    return [y.view(*p.shape[:3], -1).permute(0, 3, 1, 2) for y, p in zip(out, pixels, strict=True)]


def in_the_trainers_precision(batch: Batch, arch: str, o: Options) -> Batch:
    trainer, _ = make_ours(arch, workload(o), "auto")
    to = {"dtype": trainer.amp or torch.float32, "memory_format": torch.channels_last}
    return Batch(tuple(x.to(**to) for x in batch.images), batch.labels)  # type: ignore[call-overload]


def workload(o: Options, recompute: Any = "off") -> Workload:
    return Workload(sizes=o.sizes, batch_size=o.batch_size, recompute=recompute)


def run(o: Options) -> int:
    require_known(o.arch)
    for way in o.ways:
        if NEEDS_GPU.search(way) and not torch.cuda.is_available():
            raise UsageError(f"--ways {way!r}: it needs a GPU")
    device = device_in_use()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(json.dumps({"device": name, "torch": torch.__version__, "batch": o.batch_size}))
    for arch in o.arch:
        print(json.dumps(measure(arch, o), indent=2), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command("step_ways", Options, run))

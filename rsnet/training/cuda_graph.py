"""A training's updates as CUDA graphs: one launch by the host in place of thousands.

Whole-network capture as in PyTorch's notes on CUDA graphs: forwards at all sizes, losses, backward, the guard
against values that are not finite, and the optimizer are one graph. Not measured on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.batch import Batch, copy_batch
from pipelines.utils.errors import first_line
from rsnet.distributed.device import capture_error

AHEAD = 2  # updates that the host may be ahead of the device

# Updates before the capture: what libraries choose and allocate at their first calls must not be captured.
# PyTorch's notes take three; DDP alone needs more. They are updates of the training as any other.
WARM_UP = 3

Compute = Callable[[Batch, Tensor], dict[str, Tensor]]
Part = tuple[bool, bool]  # of an update: whether its first batch, whether its last


class _Captured(NamedTuple):
    """A graph. replay: computes the losses, `terms`, and all that the step changes, in place."""

    replay: Callable[[], None]
    terms: dict[str, Tensor]


class UpdateGraphs:
    """What an update computes, run eagerly for `WARM_UP` updates, then captured, then replayed.

    With accumulated gradients, the first, the last, and the batches between are a graph each, which share
    their memory. A replay reads nothing of Python's: a batch is copied into memory that stays, learning rate
    and step are tensors. If a capture fails, the training goes on eagerly, and `say` is told, once.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self._optimizer, self._scaler, self._say = optimizer, scaler, say
        # Of each group, a float32, as fused SGD reads it. (Eagerly it computes with a float64: the last bits
        # differ.)
        scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        self._scales = torch.tensor(scales, device=device)
        self._rates = torch.zeros_like(self._scales)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        # Warm-up and capture share it: autograd's nodes and libraries' handles belong to a stream.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._batch: Batch | None = None
        self._captured: dict[Part, _Captured] = {}
        self._ends: deque[torch.cuda.Event] = (
            deque()
        )  # of updates that the device may still compute
        self._updates = 0
        self._is_eager = True  # this update
        self._failed = False

    def run(
        self, compute: Compute, batch: Batch, part: Part, lr: float, step: int
    ) -> dict[str, Tensor]:
        """Run `compute(batch, step)`, which must not synchronise, eagerly or as a graph; return its losses.

        They are overwritten by the next run. Within `compute`, the optimizer's rate is a tensor.
        part: which of an update's batches it is; of each part, the first `compute` is captured.
        """
        torch.mul(self._scales, lr, out=self._rates)
        self._step.fill_(step)
        first, last = part
        if first:
            warm = self._updates >= WARM_UP and not self._failed
            self._is_eager = not (warm and self._takes(batch))
        self._updates += last
        if self._is_eager:
            return self._beside(compute, batch)
        self._keep(batch)
        assert self._batch is not None
        if part not in self._captured and not self._capture(compute, self._batch, part):
            self._is_eager = True
            return self._beside(compute, batch)
        captured = self._captured[part]
        captured.replay()
        if last:
            self._wait_for_device()
        return captured.terms

    def _wait_for_device(self) -> None:
        """Wait until the device is no more than `AHEAD` updates behind.

        Otherwise the loader's batches would pile up in device memory, because launching an update takes
        only a few calls.
        """
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        end.record()
        self._ends.append(end)
        if len(self._ends) > AHEAD:
            self._ends.popleft().synchronize()

    def _takes(self, batch: Batch) -> bool:
        """Return whether a batch has the shapes of the captured ones, as all of a training's have."""
        kept = self._batch
        return kept is None or [x.shape for x in kept.tensors] == [x.shape for x in batch.tensors]

    def _keep(self, batch: Batch) -> None:
        """Copy a batch to where the graphs read it, on the stream that they are launched on."""
        if self._batch is None:
            self._batch = copy_batch(batch)
        for kept, x in zip(self._batch.tensors, batch.tensors, strict=True):
            kept.copy_(x)

    def _beside(self, compute: Compute, batch: Batch) -> dict[str, Tensor]:
        """Compute eagerly, on the stream of the captures."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            terms = self._compute(compute, batch)
        current.wait_stream(self._stream)
        return terms

    def _compute(self, compute: Compute, batch: Batch) -> dict[str, Tensor]:
        """Call `compute` with tensors as the rates of the optimizer, whose state dict has floats."""
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self._rates.unbind(), strict=True):
                group["lr"] = rate
            return compute(batch, self._step)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _capture(self, compute: Compute, batch: Batch, part: Part) -> bool:
        """Capture, which computes nothing; return whether that worked."""
        graph = torch.cuda.CUDAGraph()
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters]
        current = torch.cuda.current_stream()
        try:
            # The loader's threads allocate and copy meanwhile, which "global" would not allow.
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                terms = self._compute(compute, batch)
        except RuntimeError as error:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            reason = first_line(capture_error(error))
        else:
            self._captured[part] = _Captured(graph.replay, terms)
            return True
        # Out of the handler, as the error's traceback keeps all that the capture has allocated.
        self._give_up(graph, current)
        self._say(f"--cuda-graphs: a step cannot be captured ({reason}); training goes on without")
        return False

    def _give_up(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        """Clean up after a failed capture. torch 2.15 does most of it, and 2.11 nothing.

        stream: the current one before it.
        """
        self._failed = True
        self._captured.clear()
        for name in ("grad_scale", "found_inf"):  # if it ended within the optimizer
            vars(self._optimizer).pop(name, None)
        if self._scaler.is_enabled():
            self._scaler._per_optimizer_states.clear()  # what it did of this update
        torch.cuda.set_stream(stream)
        device = stream.device_index
        graph.reset()
        with suppress(RuntimeError):  # that it is not allocating: the graph has seen to it
            # Otherwise the pool's memory would leak, and no other memory could be freed.
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)
        # The random generator still believes that it is being captured, and would refuse to draw.
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())

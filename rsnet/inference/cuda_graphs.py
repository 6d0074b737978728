"""A network's forwards as CUDA graphs: what the host would launch kernel by kernel, in one call.

Written by the documentation, and not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Forwards before the capture, as torch.cuda.make_graphed_callables has them: what libraries choose and
# allocate at their first call must not be captured.
WARM_UP = 3

Forward = Callable[[Tensor, int], Tensor]


class _Captured(NamedTuple):
    """replay: computes `logits`, (B, classes), from `inputs`, (B, 3, s, s); both stay where they are."""

    inputs: Tensor
    logits: Tensor
    replay: Callable[[], None]


class Graphs:
    """`forward`, captured once for each size and each bucket of batch sizes: 1, 2, 4, ... and the largest.

    The graphs read the one set of weights, and share the memory of what is between layers, as one of them
    runs at a time. Their own are inputs and logits.
    """

    def __init__(self, forward: Forward, largest: int) -> None:
        """forward: (N, 3, s, s) on a GPU, s -> (N, classes), without waiting for it. largest: N at most."""
        self._forward, self._largest = forward, largest
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(self, images: Tensor, size: int) -> Tensor:
        """What `forward` gives, in memory of its own. The first call of a size and bucket captures."""
        count = len(images)
        key = size, bucket(count, self._largest)
        if key not in self._captured:
            self._captured[key] = self._capture(images, *key)
        captured = self._captured[key]
        captured.inputs[:count].copy_(
            images
        )  # the rest is of earlier calls, and left out of the answer
        captured.replay()
        return captured.logits[:count].clone()

    def _capture(self, images: Tensor, size: int, count: int) -> _Captured:
        with torch.cuda.device(images.device):
            inputs = images.new_zeros(count, *images.shape[1:])
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            if self._stream is None:
                self._stream = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
                self._pool = torch.cuda.graph_pool_handle()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    self._forward(inputs, size)
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, self._stream):  # a pool wants one stream
                logits = self._forward(inputs, size)
        return _Captured(inputs, logits, graph.replay)


def bucket(count: int, largest: int) -> int:
    """The batch size that `count` images are padded to: the next power of two, but `largest` at most."""
    return min(1 << (count - 1).bit_length(), largest)

"""How a released network computes a size: with the weights of all sizes, folded ones, or as a CUDA graph.

A network's forwards as CUDA graphs: what the host would launch kernel by kernel, in one call.

Written by the documentation, and not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.utils.errors import UsageError
from rsnet.models.fold import fold_batchnorm, require_foldable
from rsnet.models.switchable import ResolutionSwitchable


class ModelRunner:
    """(N, 3, s, s) float32 or dtype, s -> (N, classes), on a device; for inference alone.

    fold: see `rsnet.models.fold`; each size gets weights of its own when it is first computed.
    """

    def __init__(
        self,
        model: ResolutionSwitchable,
        device: torch.device,
        dtype: torch.dtype | None,
        batch_size: int,
        fold: bool,
        cuda_graphs: bool,
    ) -> None:
        """What `SwitchableClassifier.load` says. Raises UsageError for what cannot be."""
        if fold:
            require_foldable(model)
        elif dtype is not None:
            _store_weights_in(dtype, model)
        if cuda_graphs and device.type != "cuda":
            raise UsageError(f"cuda_graphs: there are none on {device}")
        self._model, self._device, self._dtype, self._fold = model, device, dtype, fold
        self._folded: dict[int, nn.Module] = {}
        self._graphs = CudaGraphRunner(self._eager, batch_size) if cuda_graphs else None

    @property
    def conditions(self) -> dict[str, str | bool]:
        """What the time of a forward depends on, besides the device and the network."""
        return {
            "dtype": str(self._dtype or torch.float32),
            "fold": self._fold,
            "cuda_graphs": self._graphs is not None,
        }

    def __call__(self, images: Tensor, size: int) -> Tensor:
        return (self._graphs or self._eager)(images, size)

    def _eager(self, images: Tensor, size: int) -> Tensor:
        # A graph must not read what autocast's cache held while it was captured.
        with torch.autocast(
            self._device.type, self._dtype, enabled=self._dtype is not None, cache_enabled=False
        ):
            if not self._fold:
                return self._model(images, size)  # type: ignore[no-any-return]
            if size not in self._folded:
                self._folded[size] = self._make_folded(size)
            return self._folded[size](images)  # type: ignore[no-any-return]

    def _make_folded(self, size: int) -> nn.Module:
        network = fold_batchnorm(self._model, size)
        if self._dtype is not None:
            _store_weights_in(self._dtype, network)
        return network


def _store_weights_in(dtype: torch.dtype, network: nn.Module) -> None:
    """What autocast would make of the weights in each forward, once: the same bits in half the memory.

    At batch 1 a ResNet-18 spends a tenth of its time on that.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            for name, value in list(module.named_parameters(recurse=False)):
                # A new one: a folded network has the classifier of the one that it is made of.
                setattr(module, name, nn.Parameter(value.to(dtype), requires_grad=False))


# Forwards before the capture, as torch.cuda.make_graphed_callables has them: what libraries choose and
# allocate at their first call must not be captured.
WARM_UP = 3

ForwardFn = Callable[[Tensor, int], Tensor]


class _Captured(NamedTuple):
    """replay: computes `logits`, (B, classes), from `inputs`, (B, 3, s, s); both stay where they are."""

    inputs: Tensor
    logits: Tensor
    replay: Callable[[], None]


class CudaGraphRunner:
    """`forward`, captured once for each size and each bucket of batch sizes: 1, 2, 4, ... and the largest.

    The graphs read the one set of weights, and share the memory of what is between layers, as one of them
    runs at a time. Their own are inputs and logits.
    """

    def __init__(self, forward: ForwardFn, largest: int) -> None:
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

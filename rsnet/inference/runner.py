"""Forwards of a network at a size: with the weights of all sizes, with folded ones, or as a CUDA graph.

CUDA graphs replace the launches of single kernels by one call; they were not measured on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.utils.errors import UsageError, first_line
from pipelines.utils.memory import is_out_of_memory
from rsnet.distributed.device import capture_error
from rsnet.models.autocast import autocast, store_weights_in
from rsnet.models.fold import fold_batchnorm, require_foldable
from rsnet.models.switchable import ResolutionSwitchable


class ModelRunner:
    """Callable (N, 3, s, s) float32 or dtype, s -> (N, classes), on a device; for inference alone."""

    def __init__(
        self,
        model: ResolutionSwitchable,
        device: torch.device,
        dtype: torch.dtype | None,
        batch_size: int,
        *,
        fold: bool,
        cuda_graphs: bool,
    ) -> None:
        """Set up forwards; the arguments are those of `SwitchableClassifier.load`.

        fold: see `rsnet.models.fold`; each size gets weights of its own when it is first computed.

        Raises UsageError for CUDA graphs on a CPU, and a network that cannot be folded.
        """
        if fold:
            require_foldable(model)
        elif dtype is not None:
            store_weights_in(dtype, model)
        if cuda_graphs and device.type != "cuda":
            raise UsageError(f"cuda_graphs: there are none on {device}")
        self._model, self._device, self._dtype, self._fold = model, device, dtype, fold
        self._folded: dict[int, nn.Module] = {}
        self._graphs = CudaGraphRunner(self._eager, batch_size) if cuda_graphs else None

    @property
    def conditions(self) -> dict[str, str | bool]:
        """Conditions, besides the device and the network, that the time of a forward depends on."""
        return {
            "dtype": str(self._dtype or torch.float32),
            "fold": self._fold,
            "cuda_graphs": self._graphs is not None,
        }

    def __call__(self, images: Tensor, size: int) -> Tensor:
        return (self._graphs or self._eager)(images, size)

    def _eager(self, images: Tensor, size: int) -> Tensor:
        # Without its cache: a graph must not read what that held while it was captured.
        with autocast(self._device, self._dtype):
            if not self._fold:
                return self._model(images, size)  # type: ignore[no-any-return]
            if size not in self._folded:
                self._folded[size] = self._make_folded(size)
            return self._folded[size](images)  # type: ignore[no-any-return]

    def _make_folded(self, size: int) -> nn.Module:
        network = fold_batchnorm(self._model, size)
        if self._dtype is not None:
            store_weights_in(self._dtype, network)
        return network


# Forwards before the capture, as many as torch.cuda.make_graphed_callables does: what libraries choose and
# allocate at their first call must not be captured. (That function captures one shape a callable; buckets,
# padding and the choice among graphs would still be ours.)
WARM_UP = 3

ForwardFn = Callable[[Tensor, int], Tensor]


class _Captured(NamedTuple):
    """A graph. replay: computes `logits`, (B, classes), from `inputs`, (B, 3, s, s), in place."""

    inputs: Tensor
    logits: Tensor
    replay: Callable[[], None]


class CudaGraphRunner:
    """`forward`, captured once for each size and each bucket of batch sizes: 1, 2, 4, ... and the largest.

    The graphs read one set of weights, and share the memory of activations, as one of them runs at a time.
    Inputs and logits are their own.
    """

    def __init__(self, forward: ForwardFn, largest: int) -> None:
        """Set up; capture nothing.

        forward: (N, 3, s, s) on a GPU, s -> (N, classes), without synchronizing. largest: maximum of N.
        """
        self._forward, self._largest = forward, largest
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(self, images: Tensor, size: int) -> Tensor:
        """Return what `forward` gives, in new memory. The first call of a size and bucket captures.

        Raises UsageError if that cannot be done, as it waits for the device.
        """
        count = len(images)
        key = size, bucket(count, self._largest)
        if key not in self._captured:
            self._captured[key] = self._capture(images, *key)
        captured = self._captured[key]
        captured.inputs[:count].copy_(images)  # the rest is of earlier calls, and not returned
        captured.replay()
        return captured.logits[:count].clone()

    def _capture(self, images: Tensor, size: int, count: int) -> _Captured:
        with torch.cuda.device_of(images):  # type: ignore[no-untyped-call]
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
            try:
                # A pool wants one stream. What other threads do on a GPU meanwhile, "global" would not allow.
                with torch.cuda.graph(
                    graph, self._pool, self._stream, capture_error_mode="thread_local"
                ):
                    logits = self._forward(inputs, size)
            except RuntimeError as error:
                raise _reason(error) from error
        return _Captured(inputs, logits, graph.replay)


def _reason(error: RuntimeError) -> Exception:
    """Return what to raise for a capture that failed."""
    cause = capture_error(error)
    if is_out_of_memory(cause):
        return cause
    return UsageError(
        f"cuda_graphs: a forward of this network cannot be captured ({first_line(cause)}); leave it out"
    )


def bucket(count: int, largest: int) -> int:
    """Return the batch size that `count` images are padded to: the next power of two, or `largest`."""
    return min(1 << (count - 1).bit_length(), largest)


class PicklableLock:
    """A lock of threads that is copied and pickled as one that nobody holds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[PicklableLock], tuple[()]]:
        return PicklableLock, ()

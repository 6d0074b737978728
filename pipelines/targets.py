"""Labels and loss weights of a batch, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import LoaderSpec
from pipelines.sampler import Indices
from pipelines.sources.weights import loss_weights


class Targets:
    """The labels, (N,) int64, and in training the weights, (N,) float32 or None, of a split's samples.

    own: the source's weights, (N,). Raises UsageError, DataError for --class-weights.
    """

    def __init__(
        self,
        spec: LoaderSpec,
        labels: NDArray[np.int64],
        classes: Sequence[str],
        training: bool,
        own: NDArray[np.float64] | None = None,
    ) -> None:
        self._device, self._labels = spec.device, labels
        self.weights: NDArray[np.float32] | None = None
        if training:
            self.weights = loss_weights(
                labels, classes, own, spec.class_weights, spec.balanced_sampling
            )

    def __call__(self, rows: Indices) -> tuple[Tensor, Tensor | None]:
        """Return labels and weights of these samples."""
        labels = self._moved(self._labels[rows])
        return labels, None if self.weights is None else self._moved(self.weights[rows])

    def _moved(self, values: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()  # a copy from pageable memory would not be asynchronous
        return tensor.to(self._device, non_blocking=True)

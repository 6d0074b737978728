"""How a released network computes a size: with the weights of all sizes, folded ones, or as a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipelines.utils.errors import UsageError
from rsnet.inference.cuda_graphs import Graphs
from rsnet.models.fold import folded, require_foldable
from rsnet.models.switchable import ResolutionSwitchable


class Forward:
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
        self._graphs = Graphs(self._eager, batch_size) if cuda_graphs else None

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
        network = folded(self._model, size)
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

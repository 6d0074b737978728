"""Exact accuracies at every size and of the ensemble; each image counts once on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.batch import Loader
from rsnet.distributed import process_group as distributed
from rsnet.losses import ENSEMBLE, ensemble_logits
from rsnet.models.autocast import autocast, store_weights_in
from rsnet.models.fold import fold_batchnorm, is_foldable
from rsnet.models.switchable import ResolutionSwitchable


class Accuracy:
    """Exact top-1, top-5 and mean cross-entropy, at every size and of the ensemble."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.names = [*map(str, sizes), ENSEMBLE]
        # Counts of samples, right in one, right in five; int64, as float32 stops counting at 2^24.
        self._hits = torch.zeros(len(self.names), 2, dtype=torch.int64, device=device)
        self._loss = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self._samples = 0

    def add(self, logits: Sequence[Tensor], labels: Tensor, alpha: Tensor) -> None:
        """Count a batch: logits S x (N, C), labels (N,), alpha (S,)."""
        for row, z in enumerate([*logits, ensemble_logits(logits, alpha)]):
            z = z.float()
            top = z.topk(min(5, z.shape[1]), dim=1).indices == labels[:, None]
            self._hits[row, 0] += top[:, 0].sum()
            self._hits[row, 1] += top.sum()
            self._loss[row] += F.cross_entropy(z, labels, reduction="sum")
        self._samples += len(labels)

    def compute(self) -> dict[str, dict[str, float]]:
        """Return {"224": {"top1": %, "top5": %, "loss": mean}, ..., "ensemble": ...}, over all ranks.

        Synchronises.
        """
        samples = torch.tensor(self._samples, dtype=torch.int64, device=self._hits.device)
        n = int(distributed.all_reduce_sum(samples).item())
        hits = (100.0 * distributed.all_reduce_sum(self._hits).double() / n).tolist()
        loss = (distributed.all_reduce_sum(self._loss) / n).tolist()
        return {
            name: {"top1": one, "top5": five, "loss": mean}
            for name, (one, five), mean in zip(self.names, hits, loss, strict=True)
        }


@torch.no_grad()
def evaluate(
    model: ResolutionSwitchable,
    loader: Loader,
    device: torch.device,
    amp: torch.dtype | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Return top-1, top-5 and loss at every size and of the ensemble, over all ranks' images.

    Every image counts once. Calls `on_batch` after each batch.
    """
    accuracy = Accuracy(model.sizes, device)
    for logits, labels in batch_logits(model, loader, device, amp):
        accuracy.add(logits, labels, model.alpha)
        on_batch()
    return accuracy.compute()


@torch.no_grad()
def batch_logits(
    model: ResolutionSwitchable, loader: Loader, device: torch.device, amp: torch.dtype | None
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Yield the logits of each batch of this rank, S x (N, C), and its labels, (N,), in eval mode.

    BatchNorm is folded into the convolutions unless activations are quantized: the same logits but for
    rounding, in four fifths of the time.
    """
    was_training = model.training
    model.eval()
    forward_all = _folded_forward_all(model, amp) if is_foldable(model) else model.forward_all
    for batch in loader:
        with autocast(device, amp):
            logits = forward_all(batch.images)
        yield logits, batch.labels
    model.train(was_training)


def _folded_forward_all(
    model: ResolutionSwitchable, amp: torch.dtype | None
) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    networks = [fold_batchnorm(model, size) for size in model.sizes]
    if amp is not None:
        for network in networks:
            store_weights_in(amp, network)
    return lambda images: tuple(network(x) for network, x in zip(networks, images, strict=True))

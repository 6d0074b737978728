"""A frozen network that teaches every size: it sees the crop that is trained on, at a size of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rsnet.losses import LossName, ensemble_logits
from rsnet.models.autocast import store_weights_in
from rsnet.models.fold import fold_batchnorm, is_foldable
from rsnet.models.pretrained import MeanStd
from rsnet.models.shapes import all_gmacs
from rsnet.models.switchable import ResolutionSwitchable


class Teacher(nn.Module):
    """Batch of training images -> logits of the frozen network, in eval mode, without gradients.

    It is no part of what is trained: neither of checkpoints nor of averaged weights, DDP and the optimizer.
    loss: the loss that it was trained with: "ce" if its logits belong to a softmax, "bce" if to sigmoids.
    """

    loss: LossName = "ce"

    scale: Tensor | None
    bias: Tensor | None
    alpha: Tensor | None
    outputs: Tensor | None

    def __init__(self, network: nn.Module, sizes: Sequence[int], images: Sequence[int]) -> None:
        """Freeze `network`, which looks at `sizes`: several are an RS-Net's, whose ensemble then teaches.

        images: the sizes of a batch's images, in their order, among which are all of `sizes`.

        Raises whatever the network does at a size that it does not work at.
        """
        super().__init__()
        self.sizes = tuple(sizes)
        self.gmacs = sum(all_gmacs(network, sizes))
        self.places = [list(images).index(size) for size in sizes]
        networks, alpha = [network] * len(self.sizes), None
        if isinstance(network, ResolutionSwitchable):
            if is_foldable(network):
                networks = [fold_batchnorm(network, size) for size in sizes]
            if len(self.sizes) > 1:
                alpha = network.alpha.detach().clone()
        self.networks = nn.ModuleList(networks)
        self.register_buffer("alpha", alpha)
        for name in ("scale", "bias", "outputs"):
            self.register_buffer(name, None)
        self.requires_grad_(False)
        self.eval()

    def renormalize(self, theirs: MeanStd, own: MeanStd) -> None:
        """Let the images, normalised by `theirs`, be normalised anew by `own`, on the device."""
        if theirs == own:
            return
        mean, std, own_mean, own_std = (
            torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (*theirs, *own)
        )
        self.scale = (std / own_std).float()
        self.bias = ((mean - own_mean) / own_std).float()

    def cast(self, dtype: torch.dtype | None) -> None:
        """Cast once the weights that autocast would cast in each step; None leaves them in float32."""
        if dtype is not None:
            for network in self.networks:
                store_weights_in(dtype, network)

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Return (N, C) logits, C the classes that are trained, of a batch's images, (N, 3, s, s) each."""
        seen = (self._normalized(images[place]) for place in self.places)
        logits = [network(x) for network, x in zip(self.networks, seen, strict=True)]
        found: Tensor = logits[0]
        if self.alpha is not None:
            with torch.autocast(found.device.type, enabled=False):  # it would average in bfloat16
                found = ensemble_logits(logits, self.alpha)
        return found if self.outputs is None else found.index_select(1, self.outputs)

    def _normalized(self, x: Tensor) -> Tensor:
        if self.scale is None or self.bias is None:
            return x
        return torch.addcmul(self.bias, x, self.scale)

    @property
    def megabytes(self) -> float:
        """Memory of the weights."""
        values = [*self.parameters(), *self.buffers()]
        return sum(value.nbytes for value in values) / 2**20

"""Differences between a pipeline's images and those of the reference, PIL's."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipelines import reference
from pipelines.batch import Loaders, LoaderSpec


def differences(loaders: Loaders, spec: LoaderSpec, split: str) -> torch.Tensor:
    """(sizes, images) mean absolute differences in 1/255; `spec` is that of the image folder, "unit".

    Of epoch 1, whose crops are not those that a loader begins with.
    """
    exact = reference.make_loaders(
        reference.ReferenceOptions(), replace(spec, device=torch.device("cpu"), normalize="unit")
    )
    ours, theirs = getattr(loaders, split), getattr(exact, split)
    for loader in (ours, theirs):
        loader.set_epoch(1)
    rows = []
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.labels.cpu(), b.labels)
        pairs = zip(a.images, b.images, strict=True)
        rows.append(torch.stack([255 * (x.cpu() - y).abs().mean(dim=(1, 2, 3)) for x, y in pairs]))
    for loader in loaders[:2]:
        loader.close()
    return torch.cat(rows, dim=1)

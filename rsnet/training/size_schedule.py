"""What --size-schedule means for the loader, and for the BatchNorm of sizes that it has not trained yet."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from rsnet.config.resolve import ResolvedConfig
from rsnet.models.state_dict import nearest_size
from rsnet.models.switchable import ResolutionSwitchable


def used_images(
    config: ResolvedConfig, teachers: Sequence[int]
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return what `LoaderSpec.used` takes: the sizes of each part of the training, and the teacher's."""
    if config.is_profile or len(config.phases) == 1:
        return ()
    images = list(enumerate(zip(config.sizes, config.train_sizes, strict=True)))
    return tuple(
        (start, tuple(i for i, (size, at) in images if size in sizes or at in teachers))
        for start, sizes in config.phases
    )


@torch.no_grad()
def follow_nearest(model: ResolutionSwitchable, but: Collection[int] = ()) -> None:
    """Copy to each size whose BatchNorms have seen no batch yet those of the nearest trained size (the
    larger of two). The size can then be evaluated with the current shared weights, and starts training from
    there. Its counters stay at 0. Synchronises. but: sizes that are left as they are.
    """
    norms = {size: model.norms_of([size]) for size in model.sizes}
    trained = [size for size in model.sizes if _has_counted(norms[size])]
    for size in model.sizes:
        if size in trained or size in but or not trained:
            continue
        theirs_of = norms[nearest_size(trained, size)]
        for own, theirs in zip(norms[size], theirs_of, strict=True):
            for name, value in own.state_dict().items():
                if name != "num_batches_tracked":
                    value.copy_(theirs.state_dict()[name])


def _has_counted(norms: list[nn.Module]) -> bool:
    counters = [
        value for norm in norms for value in norm.buffers() if not value.is_floating_point()
    ]
    return not counters or bool(torch.stack(counters).any())

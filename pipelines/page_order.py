"""The quasi-random order: shuffled by pages of a file, then within a gigabyte of pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.sampling import Indices, Schedule

# 1 GiB of FFCV's pages of 8 MiB: about 10,000 ImageNet photos are mixed, from 128 places of the file.
GROUP = 128


@dataclass(frozen=True)
class PageSchedule(Schedule):
    """Reads a page of the file as a whole, and then soon all of its samples.

    The order depends on (seed, epoch) alone; all ranks share it, so that a machine reads a page once.
    """

    pages: NDArray[np.int64]  # (samples,) where each sample lies

    order_name = "quasi-random"

    def order(self, epoch: int) -> Indices:
        rng = np.random.default_rng((self.seed, epoch))
        _, page = np.unique(self.pages, return_inverse=True)
        group = rng.permutation(page.max() + 1) // GROUP
        return np.lexsort((rng.random(self.samples), group[page]))

"""The last part of DALI's work where there is no GPU: decoded pictures to every size, on threads of our own.

DALI's own resize took three quarters of the time of its CPU graph, and is as far from PIL's.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch, LoaderSpec, Rectangle, View, eval_view
from pipelines.host import HostBatch, as_array, as_images, new_blocks, pixel_table
from pipelines.resample import resize


class Resizer:
    """Threads that resize, flip, normalise and cast what a graph of bytes has given."""

    def __init__(self, spec: LoaderSpec, threads: int) -> None:
        self._spec, self._table = spec, pixel_table(spec)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dali-resize")

    def start(self, outputs: tuple[Any, ...], labels: Tensor) -> HostBatch:
        """Begin with the outputs of `crop_graph` or `image_graph`; their memory is kept until it is done."""
        pictures, *flips = outputs
        blocks = new_blocks(self._spec, len(labels))
        outs = [as_array(block) for block in blocks]
        mirror = flips[0].as_array() if flips else None
        return HostBatch(
            self._pool,
            len(labels),
            fill=partial(self._fill, pictures, mirror, outs),
            finish=lambda: Batch(as_images(blocks), labels),
        )

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _fill(
        self,
        pictures: Any,
        mirror: NDArray[np.int32] | None,
        outs: list[NDArray[Any]],
        first: int,
        last: int,
    ) -> None:
        """mirror: (N, S) of a training batch, whose pictures are crops; None for evaluation."""
        for i in range(first, last):
            pixels = np.asarray(pictures[i])  # .at(i) would copy
            height, width, _ = pixels.shape
            box, rows = Rectangle(0, 0, height, width), pixels.reshape(height, 3 * width)
            for k, size in enumerate(self._spec.sizes):
                if mirror is None:
                    view, flip = eval_view(height, width, size), False
                else:
                    view, flip = View(size, size, 0, 0), bool(mirror[i, k])
                resize(rows, box, view, flip, self._table, outs[k][i])

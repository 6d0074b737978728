"""Dynamic batching of many requests' images, by one thread that alone uses the network."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from pipelines.utils.errors import first_line
from pipelines.utils.output import say
from rsnet.inference.cascade import Cascade, Predict, Prediction

# Of a finished batch: its size in pixels, its images, milliseconds.
OnBatch = Callable[[int, int, float], None]


@dataclass(eq=False)
class _Job:
    """An image on its way through a cascade.

    pixels: by size, (s, s, 3) uint8. future: of its predictions, one for each size that it went through.
    """

    pixels: Mapping[int, Tensor]
    cascade: Cascade
    since: float
    future: Future[list[Prediction]] = field(default_factory=Future)
    found: list[Prediction] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.cascade[len(self.found)].size


class DynamicBatcher:
    """A thread that computes full batches of one size, the oldest image's first."""

    def __init__(
        self, predict: Predict, batch_size: int, wait_s: float, on_batch: OnBatch | None = None
    ) -> None:
        """Set up. wait_s: seconds that an image waits for others, if its batch is not full."""
        self._predict, self._batch_size, self._wait = predict, batch_size, wait_s
        self._on_batch = on_batch or (lambda *_: None)
        self._jobs: list[_Job] = []  # the oldest first
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Cancel what waits, and return when the thread has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, pixels: Mapping[int, Tensor], cascade: Cascade) -> Future[list[Prediction]]:
        """Queue an image; return its future predictions, one a size that it goes through, the last decides.

        pixels: (s, s, 3) uint8 at each size s of the cascade. A future that is cancelled is not computed
        any more; if the batch fails, it has the exception.
        """
        job = _Job(pixels, cascade, time.monotonic())
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def _run(self) -> None:
        while batch := self._next_batch():
            size = batch[0].size
            start = time.perf_counter()
            try:
                predictions = self._predict([job.pixels[size] for job in batch], size)
            except Exception as error:  # such as too little memory: the next batch may be smaller
                say(f"a batch at size {size} failed: {first_line(error)}", sys.stderr)
                for job in batch:
                    if job.future.set_running_or_notify_cancel():
                        job.future.set_exception(error)
                continue
            self._on_batch(size, len(batch), 1000 * (time.perf_counter() - start))
            unsure = [j for j, p in zip(batch, predictions, strict=True) if _goes_on(j, p)]
            with self._changed:
                self._jobs[:0] = unsure  # they are the oldest
        for job in self._jobs:
            job.future.cancel()

    def _next_batch(self) -> list[_Job]:
        """Wait for a batch; return an empty one when stopping."""
        with self._changed:
            while not self._stopping:
                self._jobs = [job for job in self._jobs if not job.future.cancelled()]
                oldest = self._of_size(self._jobs[0].size) if self._jobs else []
                patience = oldest[0].since + self._wait - time.monotonic() if oldest else None
                batch = oldest if patience is not None and patience <= 0 else self._full()
                if batch:
                    self._jobs = [job for job in self._jobs if job not in batch]
                    return batch
                self._changed.wait(patience)
            return []

    def _full(self) -> list[_Job]:
        """Return a batch that nothing can be added to, of the size whose image has waited the longest."""
        for size in dict.fromkeys(job.size for job in self._jobs):
            if len(batch := self._of_size(size)) == self._batch_size:
                return batch
        return []

    def _of_size(self, size: int) -> list[_Job]:
        return [job for job in self._jobs if job.size == size][: self._batch_size]


def _goes_on(job: _Job, prediction: Prediction) -> bool:
    """Return whether the image needs the next size; if not, resolve its future."""
    threshold = job.cascade[len(job.found)].threshold
    job.found.append(prediction)
    if len(job.found) < len(job.cascade) and prediction.probabilities[0] < threshold:
        return True
    if job.future.set_running_or_notify_cancel():
        job.future.set_result(job.found)
    return False

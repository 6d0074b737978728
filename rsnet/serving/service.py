"""Classification of uploaded images: admission, decoding, batching, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from fastapi import HTTPException, Request
from torch import Tensor

from pipelines.utils.errors import UsageError, first_line
from rsnet.inference.cascade import Cascade, CascadeStage, Prediction
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.serving import upload
from rsnet.serving.dynamic_batcher import DynamicBatcher
from rsnet.serving.metrics import Metrics
from rsnet.serving.size_controller import SizeController

# PIL decodes without Python's lock. Each thread may hold a decoded image of `most_pixels`.
DECODERS = min(4, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Settings:
    """Limits of a service.

    queue: requests that may be under way at once. timeout_s: seconds for an answer, from when the
    image is there. batch_wait_s: seconds that an image waits for others.
    """

    limits: upload.Limits
    batch_size: int
    batch_wait_s: float
    queue: int
    timeout_s: float


class Service:
    """A classifier that many requests share. Its methods belong to one event loop."""

    def __init__(
        self,
        classifier: SwitchableClassifier,
        settings: Settings,
        controller: SizeController | None = None,
    ) -> None:
        """Set up. controller: chooses the size of requests that name none; without one it is the largest."""
        self.classifier, self._settings, self._controller = classifier, settings, controller
        self.batches = DynamicBatcher(
            classifier.predict,
            settings.batch_size,
            settings.batch_wait_s,
            self._note_batch,
        )
        self.metrics = Metrics(classifier.sizes, lambda: self._under_way)
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")
        # Else images of requests that were given up would wait with their bytes for a decoder.
        self._free_decoders = asyncio.Semaphore(DECODERS)
        self._under_way = 0
        # Images by size, of requests whose image is there.
        self._unanswered: Counter[int] = Counter()

    def start(self) -> None:
        self.batches.start()

    async def stop(self) -> None:
        """Stop when the batch under way is computed; requests that wait are answered meanwhile."""
        await asyncio.to_thread(self.batches.stop)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def classify(
        self,
        request: Request,
        size: int | None = None,
        confidence: float | None = None,
        budget_ms: float | None = None,
    ) -> list[Prediction]:
        """Classify the image in a request; return one prediction for each size that it went through.

        Raises HTTPException: 422 for what `SwitchableClassifier.classify` calls a usage error, 503 if
        too many requests are under way, 504 if the answer takes too long, and what `upload` raises.
        """
        try:
            cascade = self.classifier.cascade(size, confidence, budget_ms)
        except UsageError as error:
            raise HTTPException(422, str(error)) from error
        is_free = size is None and confidence is None and budget_ms is None
        found = await self._answer(request, None if is_free and self._controller else cascade)
        self.metrics.decided(found[-1].size)
        return found

    async def compare(self, request: Request) -> list[Prediction]:
        """Classify the image in a request at every size, the largest first; raises what `classify` does."""
        return await self._answer(
            request, tuple(CascadeStage(s, 2.0) for s in self.classifier.sizes)
        )

    async def _answer(self, request: Request, cascade: Cascade | None) -> list[Prediction]:
        """Read and classify the image. cascade: None for the size that the controller chooses."""
        if self._under_way >= self._settings.queue:
            # To close a connection that still sends may take the answer from its client.
            await upload.discard(request, self._settings.limits)
            raise _busy(f"{self._under_way} requests are under way")
        with self._admitted():
            data = await upload.read(request, self._settings.limits)
            if cascade is not None:
                return await self._until_disconnect(request, data, cascade)
            assert self._controller is not None
            start = time.monotonic()
            size = self._controller.choose(start, self._unanswered)
            if size is None:
                raise _busy("no size is fast enough for the deadline now")
            answer = await self._until_disconnect(request, data, (CascadeStage(size),))
            self._controller.answered(size, 1000 * (time.monotonic() - start))
            return answer

    async def _computed(self, data: bytes, cascade: Cascade) -> list[Prediction]:
        sizes = [stage.size for stage in cascade]
        pixels = await self._decoded(data, sizes)
        try:
            return await asyncio.wrap_future(self.batches.submit(pixels, cascade))
        except Exception as error:  # whatever the network's library raises
            raise HTTPException(500, f"computing failed: {first_line(error)}") from error

    async def _decoded(self, data: bytes, sizes: Sequence[int]) -> dict[int, Tensor]:
        """Decode an image, once a decoder is free; it is taken until it is done, whoever has given up."""
        await self._free_decoders.acquire()
        loop = asyncio.get_running_loop()

        def free(_: object) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(self._free_decoders.release)

        most = self._settings.limits.most_pixels
        work = self._decoders.submit(upload.decode, data, sizes, most)
        work.add_done_callback(free)
        return await asyncio.wrap_future(work)

    async def _until_disconnect(
        self, request: Request, data: bytes, cascade: Cascade
    ) -> list[Prediction]:
        """Compute, until it takes too long or the client has disconnected; then cancel."""
        task = asyncio.ensure_future(self._computed(data, cascade))
        left = asyncio.ensure_future(_disconnected(request))
        try:
            with self._waiting(cascade):
                await asyncio.wait(
                    (task, left),
                    timeout=self._settings.timeout_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            if task.done():
                return task.result()
            # Not read if the client has disconnected.
            raise HTTPException(504, f"there was no answer within {self._settings.timeout_s:g} s")
        except asyncio.CancelledError:  # by the server, which has waited long enough for its end
            raise _busy("it shuts down") from None
        finally:
            task.cancel()
            left.cancel()
            # Until then the image would still be computed, and the request no longer counted.
            await asyncio.gather(task, left, return_exceptions=True)

    def _note_batch(self, size: int, images: int, ms: float) -> None:
        self.metrics.computed(size, images, ms)
        if self._controller is not None:
            self._controller.computed(size, images, ms)

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    @contextmanager
    def _waiting(self, cascade: Cascade) -> Iterator[None]:
        sizes = [stage.size for stage in cascade]
        self._unanswered.update(sizes)
        try:
            yield
        finally:
            self._unanswered.subtract(sizes)


def _busy(why: str) -> HTTPException:
    return HTTPException(503, f"the server is busy: {why}", {"Retry-After": "1"})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

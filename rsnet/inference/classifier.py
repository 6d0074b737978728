"""A released network at work: pictures in, class names out, at the size that a call asks for.

Needs torch, torchvision, safetensors, numpy and pillow alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from pipelines.normalize import PixelNormalizer
from pipelines.utils.errors import DataError, UsageError, first_line
from rsnet.inference import cascade, latency
from rsnet.inference import preprocess as pictures
from rsnet.inference import tuned as tuned_file
from rsnet.inference.cascade import Cascade, CascadeStage, Prediction
from rsnet.inference.preprocess import Picture
from rsnet.inference.runner import ModelRunner
from rsnet.inference.tuned import Tuned
from rsnet.release import package as release

__all__ = ["Prediction", "SwitchableClassifier"]

Key = TypeVar("Key")

# Images of a forward. More are no faster on any device, and their pixels alone fill 10 GB.
MOST_BATCH = 65536

UNCALIBRATED: Mapping[int, float] = {}  # temperatures


class SwitchableClassifier:
    """A release's network, whose size each call chooses: one set of weights, nothing is loaded anew.

    One thread at a time may use it, as the size is a state of the network.
    """

    def __init__(
        self,
        folder: Path,
        read: release.Release,
        device: torch.device,
        dtype: torch.dtype | None,
        batch_size: int,
        top: int,
        fold: bool,
        cuda_graphs: bool,
    ) -> None:
        """What `load` says; read: the release that lies in `folder`."""
        network = read.config["network"]
        model = release.built(read, network["sizes"])
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.sizes = model.sizes
        self.num_classes: int = network["num_classes"]
        self.accuracy: dict[str, dict[str, float]] | None = read.config["accuracy"]
        self._forward = ModelRunner(self.model, device, dtype, batch_size, fold, cuda_graphs)
        self._names = network["classes"]
        self.device = device
        self.batch_size, self._top = batch_size, min(top, self.num_classes)
        self.config = read.config  # the content of config.json
        self._folder, self._sha256 = folder, read.config["weights"]["sha256"]
        self._latencies: latency.Table | None = None
        self._normalize = PixelNormalizer(device, dtype or torch.float32, network["normalize"])

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
        top: int = 5,
        fold: bool = False,
        cuda_graphs: bool = False,
    ) -> SwitchableClassifier:
        """The network of the release in `folder`.

        dtype: torch.bfloat16 computes under autocast; None in float32. batch_size: images a forward, at
        most. top: how many classes a prediction names. fold: BatchNorm becomes part of the convolutions;
        faster, with a copy of the weights for each size that is used. cuda_graphs: fewer calls from the
        host, on a GPU alone (not measured yet).

        Raises what `release.read` does, and UsageError, a ValueError, for a device that is not there,
        another dtype, numbers below 1, and a fold of a network whose activations are quantized.
        """
        if dtype not in (None, torch.bfloat16):
            raise UsageError(f"dtype {dtype}: give torch.bfloat16 or None")
        if not 1 <= batch_size <= MOST_BATCH:
            raise UsageError(f"batch_size {batch_size}: must be from 1 to {MOST_BATCH}")
        if top < 1:
            raise UsageError(f"top {top}: at least 1 is needed")
        place = _require_device(device)
        read = release.read(Path(folder))
        return cls(Path(folder), read, place, dtype, batch_size, top, fold, cuda_graphs)

    def classify(
        self,
        images: Picture | Sequence[Picture],
        size: int | None = None,
        confidence: float | None = None,
        budget_ms: float | None = None,
        tuned: bool = False,
    ) -> list[Prediction]:
        """One prediction per image, in their order, of one picture or a list or tuple of such.

        Pictures are prepared as in an evaluation: all of PIL's modes to RGB, EXIF's rotation left out.
        size: one of `sizes`; the largest if not given.
        confidence: in its place, a probability in (0, 1]: the smallest size comes first, and an image goes
        on to the next larger one as long as its most likely class is below that.
        budget_ms: in place of both, the milliseconds that a whole batch may take: the most accurate size
        that does so in 95 of 100 batches is taken, by a table that `calibrate_latency` measures if it did
        not before.
        tuned: probabilities are calibrated by the temperatures of `python -m rsnet tune`, also those that
        `confidence` is compared with; and if none of the three is given, its cascade decides. Without it,
        what was tuned changes nothing.

        Raises UsageError, a ValueError, for another size, a wrong confidence, a budget that no size fits
        into, more than one of the three, no images, what is no picture, or a release that is not tuned;
        DataError for an image, which it names, that cannot be decoded or is too large, and for a
        damaged tuned.json.
        """
        many = images if isinstance(images, list | tuple) else [cast(Picture, images)]
        if not many:
            raise UsageError("there are no images")
        decoded = ((i, self.decode(picture, f"image {i}")) for i, picture in enumerate(many))
        found = dict(self.stream(decoded, size, confidence, budget_ms, tuned))
        return [found[i] for i in range(len(many))]

    def decode(self, picture: Picture, name: str = "the image") -> Image.Image:
        """The RGB image of a picture. In an error it goes by its path, or else by `name`.

        Raises UsageError for what is no picture, DataError for one that cannot be decoded or is too large.
        """
        return pictures.decode(picture, name, self.sizes[0])

    def stream(
        self,
        images: Iterable[tuple[Key, Image.Image]],
        size: int | None = None,
        confidence: float | None = None,
        budget_ms: float | None = None,
        tuned: bool = False,
    ) -> Iterator[tuple[Key, Prediction]]:
        """Predictions of decoded images, under the keys these came with; for more than memory holds.

        They come when they are decided: in the order of the images, but for a cascade, in which up to two
        batches of decoded images wait at each size but the largest.

        Raises what `classify` does.
        """
        found = self.tuned() if tuned else None
        is_free = [size, confidence, budget_ms] == [None, None, None]
        ladder = found.ladder if found and is_free else self.ladder(size, confidence, budget_ms)
        predict = partial(self.predict, temperatures=found.temperatures if found else UNCALIBRATED)
        return cascade.run_cascade(images, ladder, predict, self.batch_size)

    def calibrate_latency(self) -> latency.Table:
        """Measure a whole batch at each size, from pixels on the host to probabilities there.

        The table is kept beside the release, as latency-DEVICE.json, where that can be written.
        """
        self._latencies = latency.measure(self.blank_forward(self.batch_size), self.sizes)
        with suppress(OSError):
            latency.save(self._latency_file, self.conditions, self._latencies)
        return self._latencies

    def latencies(self) -> latency.Table:
        """Milliseconds of a whole batch: the table beside the release if it holds, else a new one.

        Raises DataError for a file that is no such table.
        """
        if self._latencies is None:
            self._latencies = latency.load(self._latency_file, self.conditions, self.sizes)
        return self._latencies or self.calibrate_latency()

    def ms_per_image(self) -> dict[int, float]:
        """By size, the median batch's milliseconds over the images in it."""
        return {s: ms["median"] / self.batch_size for s, ms in self.latencies().items()}

    def blank_forward(self, batch_size: int) -> Callable[[int], object]:
        """What computes a batch of black images at a size, from the host and back: to be timed."""
        pixels = {s: [torch.zeros(s, s, 3, dtype=torch.uint8)] * batch_size for s in self.sizes}
        return lambda size: self.predict(pixels[size], size)

    @torch.inference_mode()
    def logits(self, pixels: Tensor, size: int) -> Tensor:
        """(N, size, size, 3) uint8, as `pictures.eval_pixels` has them -> (N, classes) float32.

        Raises DataError if the batch does not fit into memory.
        """
        try:
            images = self._normalize(pixels.to(self.device)).permute(0, 3, 1, 2)
            return self._forward(images, size).float()
        except RuntimeError as error:
            # The CPU's allocator has no type of its own.
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(
                error
            ):
                raise
            what = (
                f"{len(pixels)} images at size {size} do not fit into the memory of {self.device}"
            )
            raise DataError(
                f"{what}; give a smaller --batch-size than {self.batch_size}"
            ) from error

    @property
    def conditions(self) -> dict[str, Any]:
        """What a table of latencies holds for."""
        return {
            "device": latency.device_name(self.device),
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size,
            **self._forward.conditions,
            "torch": torch.__version__,
            "sha256": self._sha256,
        }

    @property
    def _latency_file(self) -> Path:
        return latency.path_of(self._folder, self.conditions["device"])

    def tuned(self) -> Tuned:
        """What `python -m rsnet tune` found. Raises what `tuned.read` does."""
        return tuned_file.read(self._folder, self._sha256, self.sizes)

    def ladder(
        self,
        size: int | None = None,
        confidence: float | None = None,
        budget_ms: float | None = None,
    ) -> Cascade:
        """The sizes that an image goes through. The arguments, and what is raised, are `classify`'s."""
        if [size, confidence, budget_ms].count(None) < 2:
            raise UsageError("give one of size, confidence and budget_ms")
        if confidence is not None:
            if not 0 < confidence <= 1:
                raise UsageError(f"confidence {confidence}: must be above 0, and 1 at most")
            *smaller, largest = self.sizes[::-1]
            return (*(CascadeStage(s, confidence) for s in smaller), CascadeStage(largest))
        if budget_ms is not None:
            return (CascadeStage(latency.best_size(self.latencies(), budget_ms, self.accuracy)),)
        if size is not None and size not in self.sizes:
            known = " ".join(map(str, self.sizes))
            raise UsageError(f"size {size}: this network has {known}")
        return (CascadeStage(size or self.sizes[0]),)

    def predict(
        self, pixels: list[Tensor], size: int, temperatures: Mapping[int, float] = UNCALIBRATED
    ) -> list[Prediction]:
        """Predictions of one batch: (size, size, 3) uint8 each, as `pictures.eval_pixels` gives them.

        temperatures: by size, what logits are divided by; 1 if not given.
        """
        start = time.perf_counter()
        logits = self.logits(torch.stack(pixels), size) / temperatures.get(size, 1.0)
        probabilities, classes = (t.tolist() for t in logits.softmax(dim=1).topk(self._top))
        ms = 1000 * (time.perf_counter() - start) / len(pixels)
        return [
            Prediction(tuple(map(self._name, indices)), tuple(values), size, ms)
            for values, indices in zip(probabilities, classes, strict=True)
        ]

    def _name(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else str(index)


def _require_device(device: str | torch.device) -> torch.device:
    try:
        torch.zeros(1, device=device).item()
    # From a PyTorch without CUDA, and for a device that needs a module of its own.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"device {device}: {first_line(error)}") from error
    return torch.device(device)

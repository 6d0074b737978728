"""Classification with a released network: images in, class names out, at the size that a call asks for.

Needs torch, torchvision, safetensors, numpy and pillow alone.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor, nn

from pipelines.normalize import PixelNormalizer
from pipelines.utils.errors import DataError, UsageError, first_line
from pipelines.utils.memory import is_out_of_memory
from pipelines.utils.output import say
from rsnet.distributed.device import keep_freed_memory
from rsnet.inference import latency, preprocess
from rsnet.inference.cascade import (
    Cascade,
    CascadeStage,
    Prediction,
    Tuned,
    read_tuned,
    run_cascade,
)
from rsnet.inference.onnx_runner import OnnxRunner, is_export
from rsnet.inference.preprocess import ImageInput
from rsnet.inference.runner import ModelRunner, PicklableLock, bucket
from rsnet.release import package as release
from rsnet.release.config import output_names

__all__ = ["Prediction", "SwitchableClassifier"]

Key = TypeVar("Key")

Engine = Literal["torch", "onnxruntime"]

# Images of a forward. More are no faster on any device, and their pixels alone fill 10 GB.
MAX_BATCH = 65536

UNCALIBRATED: Mapping[int, float] = {}  # temperatures


class SwitchableClassifier:
    """A release's network; each call chooses the size, with one set of weights and nothing loaded again.

    Use it from one thread at a time, as the size is a state of the network.
    """

    def __init__(
        self,
        content: release.Release,
        device: torch.device,
        dtype: torch.dtype | None,
        *,
        batch_size: int,
        top: int,
        fold: bool,
        cuda_graphs: bool,
        onnx: OnnxRunner | None = None,
    ) -> None:
        """Build the network of `content`; the rest are `load`'s arguments.

        onnx: in place of that network, the exported one; there is no `model` then.
        """
        network = content.config["network"]
        self._forward: ModelRunner | OnnxRunner
        self._alone = PicklableLock()
        self._modules: list[nn.Module] = []  # to look through the network takes ten times as long
        if onnx is None:
            model = release.build(content, network["sizes"])
            self.model = model.to(device).to(memory_format=torch.channels_last)
            self._modules = list(model.modules())
            self.sizes, self._sha256 = model.sizes, content.config["weights"]["sha256"]
            self._forward = ModelRunner(
                self.model, device, dtype, batch_size, fold=fold, cuda_graphs=cuda_graphs
            )
        else:
            self._forward, self.sizes, self._sha256 = onnx, onnx.sizes, onnx.sha256
        self.num_classes: int = network["num_classes"]
        known = content.config["accuracy"] if onnx is None else onnx.accuracy
        self.accuracy: dict[str, dict[str, float]] | None = known
        self._names = output_names(content.config)
        self.device = device
        self.batch_size, self._top = batch_size, min(top, self.num_classes)
        self.config = content.config  # of config.json
        self.release = content
        self._latencies: latency.Table | None = None
        self._is_stored = False  # whether they were read from the file
        self._normalize = PixelNormalizer(device, dtype or torch.float32, network["normalize"])

    @classmethod
    def load(
        cls,
        folder: str | Path | release.Release,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
        top: int = 5,
        *,
        fold: bool = False,
        cuda_graphs: bool = False,
        engine: Engine | None = None,
    ) -> SwitchableClassifier:
        """Load the release in `folder`, at an address on the hub (hf://USER/NAME@REVISION), or read already.

        dtype: torch.bfloat16 computes under autocast; None in float32. batch_size: most images of a
        forward. top: how many classes a prediction names. fold: BatchNorm becomes part of the convolutions;
        faster, with a copy of the weights for each size that is used. cuda_graphs: fewer calls from the
        host, on a GPU alone (not measured yet). engine: "onnxruntime" takes a folder that
        `rsnet export --format onnx` wrote, and computes as its files do, on the CPU; None by the folder.
        On a CPU, this process keeps the memory that it frees from then on, see `keep_freed_memory`.

        Raises what `release.read` does, and UsageError, a ValueError, for a device that is not there,
        another dtype, numbers below 1, and a fold of a network whose activations are quantized.
        """
        if dtype not in (None, torch.bfloat16):
            raise UsageError(f"dtype {dtype}: give torch.bfloat16 or None")
        if not 1 <= batch_size <= MAX_BATCH:
            raise UsageError(f"batch_size {batch_size}: must be from 1 to {MAX_BATCH}")
        if top < 1:
            raise UsageError(f"top {top}: at least 1 is needed")
        place = _require_device(device)
        onnx = None
        if isinstance(folder, release.Release):
            content = folder
        elif engine == "onnxruntime" or (engine is None and is_export(Path(folder))):
            onnx = OnnxRunner(Path(folder))
            content = release.Release(onnx.config, {}, Path(folder))
            if place.type != "cpu" or dtype is not None or fold or cuda_graphs:
                raise UsageError(
                    "--engine onnxruntime: the files say how they are computed, on the CPU; leave out "
                    "--device, --dtype, --fold and --cuda-graphs"
                )
        else:
            content = release.read(folder)
        keep_freed_memory(place)
        return cls(
            content,
            place,
            dtype,
            batch_size=batch_size,
            top=top,
            fold=fold,
            cuda_graphs=cuda_graphs,
            onnx=onnx,
        )

    def classify(
        self,
        images: ImageInput | Sequence[ImageInput],
        size: int | None = None,
        confidence: float | None = None,
        budget_ms: float | None = None,
        tuned: bool = False,
    ) -> list[Prediction]:
        """Classify one image, or a list or tuple of images; one prediction each, in their order.

        Images are prepared as in an evaluation: all of PIL's modes to RGB, EXIF's rotation left out.
        size: one of `sizes`; the largest if not given.
        confidence: in its place, a probability in (0, 1]: the smallest size comes first, and an image goes
        on to the next larger one as long as its most likely class is below that.
        budget_ms: in place of both, the milliseconds that a whole batch may take: the most accurate size
        that does so in 95 of 100 batches is taken, by a table that `calibrate_latency` measures if it did
        not before.
        tuned: probabilities are calibrated by the temperatures of `rsnet tune`, also those that
        `confidence` is compared with; and if none of the three is given, its cascade decides. Without it,
        what was tuned changes nothing.

        Raises UsageError, a ValueError, for another size, a wrong confidence, a budget that no size fits
        into, more than one of the three, no images, what is no image, or a release that is not tuned;
        DataError for an image, which it names, that cannot be decoded or is too large, and for a
        damaged tuned.json.
        """
        many = images if isinstance(images, list | tuple) else [cast(ImageInput, images)]
        if not many:
            raise UsageError("there are no images")
        found = dict(self.stream(enumerate(many), size, confidence, budget_ms, tuned))
        return [found[i] for i in range(len(many))]

    def decode(self, source: ImageInput, name: str = "the image") -> Image.Image:
        """Decode an image to RGB. An error names its path, or else `name`.

        Raises UsageError for what is no image, DataError for one that cannot be decoded or is too large.
        """
        return preprocess.decode(source, name, self.sizes[0])

    def stream(
        self,
        images: Iterable[tuple[Key, ImageInput]],
        size: int | None = None,
        confidence: float | None = None,
        budget_ms: float | None = None,
        tuned: bool = False,
    ) -> Iterator[tuple[Key, Prediction]]:
        """Yield predictions of (key, image) pairs, under their keys, as of `enumerate`; for more than memory
        holds.

        They come as they are decided: in the order of the images, except with a cascade, in which up to two
        batches of decoded images wait at each size but the largest.

        Raises what `classify` does.
        """
        found = self.tuned() if tuned else None
        is_free = [size, confidence, budget_ms] == [None, None, None]
        try:
            cascade = (
                found.cascade if found and is_free else self.cascade(size, confidence, budget_ms)
            )
        except latency.OverBudgetError as error:
            raise UsageError(f"{error}{self.remeasure_advice()}") from error
        predict = partial(self.predict, temperatures=found.temperatures if found else UNCALIBRATED)
        decoded = ((key, self.decode(image, f"image {key}")) for key, image in images)
        return run_cascade(decoded, cascade, predict, self.batch_size)

    def calibrate_latency(self) -> latency.Table:
        """Measure a whole batch at each size, from pixels on the host to probabilities there.

        The table is kept beside the release, as latency-DEVICE.json, where that can be written; for this
        process alone if the device was busy with something else, which is said on stderr.
        """
        self._latencies, self._is_stored = self.measure_batches(self.batch_size), False
        if reason := latency.unsteady(self._latencies):
            say(f"these latencies are not stored: {reason}", sys.stderr)
            return self._latencies
        with suppress(OSError):
            latency.save(self._latency_file, self.conditions, self._latencies)
        return self._latencies

    def measure_batches(self, batch_size: int) -> latency.Table:
        """Measure batches of this size, which takes seconds to minutes: it is said on stderr."""
        sizes = " ".join(map(str, self.sizes))
        what = f"measuring batches of {batch_size} at sizes {sizes} on {self.device}"
        say(what, sys.stderr)
        return latency.measure(self.blank_forward(batch_size), self.sizes)

    def latencies(self) -> latency.Table:
        """Return milliseconds of a whole batch: from the table beside the release if it holds, else measured.

        Raises DataError for a file that is no such table.
        """
        if self._latencies is None:
            self._latencies = latency.load(self._latency_file, self.conditions, self.sizes)
            self._is_stored = self._latencies is not None
        return self._latencies or self.calibrate_latency()

    def remeasure_advice(self) -> str:
        """Return the end of an error about latencies that an earlier process measured; "" if this one did."""
        if not self._is_stored:
            return ""
        return f"; says {self._latency_file}: --remeasure, or calibrate_latency(), measures anew"

    def ms_per_image(self) -> dict[int, float]:
        """Return, by size, the median batch's milliseconds over the images in it."""
        return {s: ms["median"] / self.batch_size for s, ms in self.latencies().items()}

    def blank_forward(self, batch_size: int) -> Callable[[int], object]:
        """Return a function that computes a batch of black images at a size, from the host and back."""
        pixels = {s: [torch.zeros(s, s, 3, dtype=torch.uint8)] * batch_size for s in self.sizes}
        return lambda size: self.predict(pixels[size], size)

    def capture(self) -> None:
        """Capture all CUDA graphs now, so that no later batch is the first of its kind."""
        for count in sorted({bucket(n + 1, self.batch_size) for n in range(self.batch_size)}):
            forward = self.blank_forward(count)
            for size in self.sizes:
                forward(size)

    @torch.inference_mode()
    def logits(self, pixels: Tensor, size: int) -> Tensor:
        """Compute (N, size, size, 3) uint8, from `preprocess.eval_pixels`, to (N, classes) float32.

        Raises DataError if the batch does not fit into memory.
        """
        try:
            with self._of_one_thread():
                return self._forward(self.normalized(pixels), size).float()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DataError(
                f"{len(pixels)} images at size {size} do not fit into the memory of {self.device}; "
                f"give a smaller --batch-size than {self.batch_size}"
            ) from error

    @contextmanager
    def _of_one_thread(self) -> Iterator[None]:
        """Let one thread alone use the network, in eval mode: BatchNorm would learn from what is classified.

        Which BatchNorm is used is a state of the network. ONNX Runtime has none.
        """
        if not self._modules:
            yield
            return
        with self._alone:
            training = [module for module in self._modules if module.training]
            for module in training:
                module.training = False
            try:
                yield
            finally:
                for module in training:
                    module.training = True

    def normalized(self, pixels: Tensor) -> Tensor:
        """Return the network's input, (N, 3, size, size), of such pixels."""
        return self._normalize(pixels.to(self.device)).permute(0, 3, 1, 2)

    @property
    def conditions(self) -> dict[str, Any]:
        """Conditions that a table of latencies holds for."""
        return {
            "device": latency.device_name(self.device),
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size,
            **self._forward.conditions,
            "torch": torch.__version__,
            "sha256": self._sha256,
        }

    @property
    def allocates(self) -> bool:
        """Whether torch allocates what a forward takes: not ONNX Runtime's, nor what a CUDA graph holds."""
        conditions = self._forward.conditions
        return not (conditions["cuda_graphs"] or "engine" in conditions)

    @property
    def _latency_file(self) -> Path:
        return self.release.beside(latency.file_name(self.conditions["device"]))

    def tuned(self) -> Tuned:
        """Return what `rsnet tune` found. Raises what `read_tuned` does."""
        found = self.release
        return read_tuned(found.folder, self._sha256, self.sizes, found.prefix)

    def cascade(
        self,
        size: int | None = None,
        confidence: float | None = None,
        budget_ms: float | None = None,
    ) -> Cascade:
        """Return the sizes that an image goes through. Arguments and errors are those of `classify`."""
        if [size, confidence, budget_ms].count(None) < 2:
            raise UsageError("give one of size, confidence and budget_ms")
        if confidence is not None:
            if not 0 < confidence <= 1:
                raise UsageError(f"confidence {confidence}: must be above 0, and 1 at most")
            *smaller, largest = self.sizes[::-1]
            return (*(CascadeStage(s, confidence) for s in smaller), CascadeStage(largest))
        if budget_ms is not None:
            if not budget_ms > 0:
                raise UsageError(f"budget_ms {budget_ms}: must be above 0")
            return (CascadeStage(latency.best_size(self.latencies(), budget_ms, self.accuracy)),)
        if size is not None and size not in self.sizes:
            known = " ".join(map(str, self.sizes))
            raise UsageError(f"size {size}: this network has {known}")
        return (CascadeStage(int(size or self.sizes[0])),)

    def predict(
        self, pixels: list[Tensor], size: int, temperatures: Mapping[int, float] = UNCALIBRATED
    ) -> list[Prediction]:
        """Classify one batch: (size, size, 3) uint8 each, from `preprocess.eval_pixels`.

        temperatures: by size, what logits are divided by; 1 if not given.
        """
        start = time.perf_counter()
        logits = self.logits(torch.stack(pixels), size) / temperatures.get(size, 1.0)
        probabilities, classes = (t.tolist() for t in logits.softmax(dim=1).topk(self._top))
        if any(math.isnan(best) for best, *_ in probabilities):
            raise DataError(f"the network's output at size {size} is not finite; try another dtype")
        ms = 1000 * (time.perf_counter() - start) / len(pixels)
        return [
            Prediction(tuple(self._names[i] for i in indices), tuple(values), size, ms)
            for values, indices in zip(probabilities, classes, strict=True)
        ]


def _require_device(device: str | torch.device) -> torch.device:
    try:
        torch.zeros(1, device=device).item()
    # From a PyTorch without CUDA, and for a device that needs a module of its own.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"device {device}: {first_line(error)}") from error
    return torch.device(device)

"""`rsnet predict`: classify images with a trained network."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from pipelines.utils.cli import EXIT_FAILED
from pipelines.utils.errors import DataError
from pipelines.utils.output import say
from pipelines.utils.tables import text_table
from rsnet.cli.classifier import ClassifierOptions, LatencyOptions, load_classifier, say_source

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.utils.progress import ProgressBar
    from rsnet.inference.classifier import Prediction, SwitchableClassifier


@dataclass(frozen=True, kw_only=True)
class Options(LatencyOptions, ClassifierOptions):
    """Classify images with a trained network: a table, in the order of the images, or JSON.

    An image that cannot be decoded, or has more than 100 million pixels, is named on stderr and left
    out. Exit code: 0 if all were classified, 1 if some were left out, 2 if there are no images.
    """

    images: Positional[Annotated[tuple[Path, ...], arg(metavar="IMAGE|FOLDER")]]
    """Images, and folders whose images are taken at any depth."""

    size: int | None = None
    """Resolution. Unset: the network's largest."""

    confidence: float | None = None
    """In place of a size: a cascade from the smallest size up, in which an image is classified at the next
    larger size if its most likely class is below this probability."""

    budget_ms: float | None = None
    """In place of both: milliseconds for a batch. The most accurate size that fits is taken;
    latencies are measured if those beside the network are of another device or batch size."""

    tuned: bool = False
    """Calibrated probabilities and, unless one of the three above is given, the cascade of `rsnet tune`."""

    top: int = 5
    """Classes to name."""

    json: bool = False
    """Print one line of JSON per image, as soon as it is classified."""


def run(options: Options) -> int:
    from pipelines.utils.progress import ProgressBar
    from rsnet.inference.preprocess import find_images

    paths = find_images(options.images)
    classifier, source = load_classifier(options, options.top)
    readable = _Readable(classifier, paths)
    # A bar would be torn by lines on the same terminal.
    shown = any(p.is_dir() for p in options.images) and not (options.json and sys.stdout.isatty())
    answers = classifier.stream(
        readable, options.size, options.confidence, options.budget_ms, options.tuned
    )
    say_source(source, sys.stderr)
    with ExitStack() as stack:
        out = sys.stdout  # which the bar replaces by its own console, on stderr
        if shown:
            readable.progress = stack.enter_context(ProgressBar("predict", len(paths)))
        if options.json:
            for i, prediction in answers:
                line = {"image": paths[i], **prediction.to_dict(), "ms": round(prediction.ms, 3)}
                print(json.dumps(line), file=out, flush=True)
            return readable.exit_code
        found = dict(answers)
    rows = [_row(paths[i], found[i]) for i in sorted(found)]
    print(text_table(["image", "size", "ms", "classes, %"], rows, left=(0, 3)))
    return readable.exit_code


class _Readable(Iterable[tuple[int, "Image.Image"]]):
    """The images that can be decoded, by their index among the paths; the others are named on stderr."""

    def __init__(self, classifier: SwitchableClassifier, paths: list[str]) -> None:
        self.progress: ProgressBar | None = None
        self._classifier, self._paths, self._bad = classifier, paths, 0

    @property
    def exit_code(self) -> int:
        return EXIT_FAILED if self._bad else 0

    def __iter__(self) -> Iterator[tuple[int, Image.Image]]:
        size = 0
        for i, path in enumerate(self._paths):
            try:
                image = self._classifier.decode(path)
            except DataError as error:
                self._bad += 1
                say(str(error), sys.stderr)
            else:
                size += Path(path).stat().st_size
                yield i, image
            if self.progress is not None:
                self.progress.update(i + 1, size, self._bad)


def _row(path: str, prediction: Prediction) -> list[str]:
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    top = ", ".join(f"{name} {100 * value:.1f}" for name, value in pairs)
    return [path, str(prediction.size), f"{prediction.ms:.2f}", top]

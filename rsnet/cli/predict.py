"""`python -m rsnet predict`: what a release says of images."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from PIL import Image
from tyro.conf import Positional, arg

from pipelines.image_io import images_below
from pipelines.utils.cli import EXIT_FAILED
from pipelines.utils.errors import DataError, UsageError
from pipelines.utils.progress import ProgressBar
from rsnet.inference.classifier import Prediction, SwitchableClassifier


@dataclass(frozen=True)
class Options:
    """Classify images with a release: a table, in the order of the images, or JSON.

    An image that cannot be decoded, or has more than 100 million pixels, is named on stderr and left
    out. Exit code: 0 if all were classified, 1 if some were left out, 2 if there are no images.
    """

    release: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Folder that `python -m rsnet release` wrote."""

    images: Positional[Annotated[tuple[Path, ...], arg(metavar="IMAGE|FOLDER")]]
    """Images, and folders whose images are taken at any depth."""

    size: int | None = None
    """Resolution. Unset: the release's largest."""

    confidence: float | None = None
    """In place of a size: begin with the smallest, and go on to the next larger one with those images
    alone whose most likely class is below this probability."""

    budget_ms: float | None = None
    """In place of both: milliseconds that a batch may take. The most accurate size that fits is taken;
    latencies are measured if those beside the release are of another device or batch size."""

    tuned: bool = False
    """Probabilities calibrated by what `python -m rsnet tune` fitted; and its cascade, unless one of the
    three above is given."""

    device: str | None = None
    """cpu, cuda, cuda:1, ... Unset: the GPU if there is one."""

    batch_size: int = 32
    """Images that are computed at once."""

    top: int = 5
    """Classes to name."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in."""

    fold: bool = False
    """Make BatchNorm part of the convolutions: faster, with a copy of the weights for each size used."""

    cuda_graphs: bool = False
    """Fewer calls from the host to a GPU (not measured yet)."""

    json: bool = False
    """One line of JSON an image, as soon as it is classified."""


def run(options: Options) -> int:
    paths = _paths(options.images)
    classifier = SwitchableClassifier.load(
        options.release,
        options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        batch_size=options.batch_size,
        top=options.top,
        dtype=torch.bfloat16 if options.dtype == "bfloat16" else None,
        fold=options.fold,
        cuda_graphs=options.cuda_graphs,
    )
    readable = _Readable(classifier, paths)
    # A bar would be torn by lines on the same terminal.
    shown = any(p.is_dir() for p in options.images) and not (options.json and sys.stdout.isatty())
    answers = classifier.stream(
        readable, options.size, options.confidence, options.budget_ms, options.tuned
    )
    with ExitStack() as stack:
        out = sys.stdout  # which the bar replaces by its own console, on stderr
        if shown:
            readable.progress = stack.enter_context(ProgressBar("predict", len(paths)))
        if options.json:
            for i, prediction in answers:
                print(_as_json(paths[i], prediction), file=out, flush=True)
            return readable.exit_code
        found = dict(answers)
    _print_table([(paths[i], found[i]) for i in sorted(found)])
    return readable.exit_code


class _Readable(Iterable[tuple[int, Image.Image]]):
    """The images that can be decoded, with their places among the paths; the others are named."""

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
                print(_printable(str(error)), file=sys.stderr)
            else:
                size += Path(path).stat().st_size
                yield i, image
            if self.progress is not None:
                self.progress.update(i + 1, size, self._bad)


def _paths(given: tuple[Path, ...]) -> list[str]:
    """The images that are given, and those below the folders that are.

    Raises UsageError if there is nothing at a path, or no image at all.
    """
    paths: list[str] = []
    for path in given:
        if not path.exists():
            raise UsageError(f"there is no file or folder {path}")
        paths += images_below(path) if path.is_dir() else [str(path)]
    if not paths:
        raise UsageError(f"there is no image in {' '.join(map(str, given)) or 'the command'}")
    return paths


def _as_json(path: str, prediction: Prediction) -> str:
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    top = [{"class": name, "probability": value} for name, value in pairs]
    return json.dumps(
        {"image": path, "size": prediction.size, "ms": round(prediction.ms, 3), "top": top}
    )


def _print_table(found: list[tuple[str, Prediction]]) -> None:
    names = [_printable(path) for path, _ in found]
    width = max(map(len, ["image", *names]))
    print(f"{'image':{width}} {'size':>5} {'ms':>8}  classes, %")
    for name, (_, prediction) in zip(names, found, strict=True):
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        top = ", ".join(f"{_printable(what)} {100 * value:.1f}" for what, value in pairs)
        print(f"{name:{width}} {prediction.size:5} {prediction.ms:8.2f}  {top}")


def _printable(text: str) -> str:
    """Without what would move the terminal's cursor: paths and a release's names are others' texts."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

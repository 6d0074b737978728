"""Image folders, one sub-folder per class, as torchvision's ImageFolder reads them; broken images."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.image_formats import load_rgb
from pipelines.image_io import find_images, images_below, list_folder
from pipelines.utils.errors import DataError, UsageError, error_context, first_line
from pipelines.utils.output import say
from pipelines.utils.text import distinct, first_names


@dataclass(frozen=True)
class ImageFolder:
    """The images of one split; classes and paths are sorted.

    `labels[i]`, an index into `classes`, is that of `paths[i]`.
    """

    root: Path
    classes: list[str]
    paths: list[str]
    labels: NDArray[np.int64]
    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of files below the class folders that are no images, by suffix."""

    @property
    def names(self) -> list[str]:
        """The paths below `root`."""
        prefix = f"{self.root}/"
        return [path.removeprefix(prefix) for path in self.paths]

    @property
    def counted(self) -> str:
        """What was found, as text."""
        text = count_text(len(self.paths), len(self.classes))
        if self.passed_over:
            others = self.passed_over.total()
            text += f"; {others} other files passed over ({_kinds(self.passed_over)})"
        return text

    def fingerprint(self) -> str:
        """Return the SHA-256 of the images' names, in their order."""
        return hashlib.sha256(os.fsencode("\n".join(self.names))).hexdigest()


def scan_folder(root: Path) -> ImageFolder:
    """Find the images below the class folders of `root`, at any depth.

    Raises UsageError if `root` is missing, holds no class folders, or a class holds no image; RunError if
    a folder cannot be listed.
    """
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}")
    folders = [Path(path).name for path, is_folder in list_folder(root) if is_folder]
    classes = [name for name in folders if not name.startswith((".", "@"))]
    if not classes:
        what = "images but no class folders" if images_below(root) else "no images"
        raise UsageError(f"{root} holds {what}; expected {root}/CLASS/IMAGE.JPEG")
    _require_different([root / name for name in classes])
    found = find_images([root / name for name in classes])
    passed_over: Counter[str] = Counter()
    for name, (images, others) in zip(classes, found, strict=True):
        passed_over += others
        if not images:
            what = f" ({_kinds(others)} are none)" if others else ""
            raise UsageError(f"the class folder {root / name} holds no image{what}")
    paths = [path for images, _ in found for path in images]
    labels = np.repeat(np.arange(len(classes)), [len(images) for images, _ in found])
    return ImageFolder(root, classes, paths, labels, passed_over)


def announce(*folders: ImageFolder | None) -> None:
    """Print what was found in each of the folders, and warn of what is hardly meant."""
    for folder in folders:
        if folder is None:
            continue
        say(f"{folder.root}: {folder.counted}")
        if len(folder.classes) == 1:
            inside = (name.split("/")[1:] for name in folder.names)
            below = sorted({name[0] for name in inside if len(name) > 1})
            warn_of_single_class(folder.root, folder.classes[0], below)


def warn_of_single_class(data: Path, name: str, below: Sequence[str] = ()) -> None:
    """Warn that there is nothing to tell apart; `below`: folders in it, which may be the classes."""
    text = f"warning: {data} has a single class, {name}"
    if below:
        text += f", with the folders {first_names(below)}; expected {data}/CLASS/IMAGE"
    say(text, sys.stderr)


def count_text(images: int, classes: int) -> str:
    """Return the numbers of images and classes as text."""
    return f"{images} images of {classes} class{'es' if classes != 1 else ''}"


def scan_train_val(data: Path, with_train: bool = True) -> tuple[ImageFolder | None, ImageFolder]:
    """Return `data`/train, None without `with_train`, and `data`/val.

    Raises UsageError if one is missing or malformed, or their classes differ.
    """
    if not data.is_dir():
        raise UsageError(f"--data: there is no folder {data}")
    splits = ("train", "val") if with_train else ("val",)
    for split in splits:
        if not (data / split).is_dir():
            found = [Path(path).name for path, is_folder in list_folder(data) if is_folder][:5]
            raise UsageError(
                f"--data: {data} has no folder {split!r} "
                f"(it has {', '.join(found) if found else 'no folders'})"
            )
    with error_context("--data"):
        val = scan_folder(data / "val")
        train = scan_folder(data / "train") if with_train else None
    if train is None:
        return None, val
    if train.classes != val.classes:
        only_train, only_val = (
            first_names([distinct(name) for name in sorted(set(one.classes) - set(other.classes))])
            for one, other in ((train, val), (val, train))
        )
        raise UsageError(
            f"--data: the classes of {data}/train and {data}/val differ: "
            f"only in train: {only_train}; only in val: {only_val}"
        )
    return train, val


def _require_different(folders: list[Path]) -> None:
    """Raise UsageError if two class folders are one, by a link: its images would have two labels."""
    known: dict[Path, Path] = {}
    for folder in folders:
        other = known.setdefault(folder.resolve(), folder)
        if other != folder:
            raise UsageError(f"the class folders {other} and {folder} are the same folder")


def _kinds(passed_over: Counter[str]) -> str:
    """Return the suffixes and their numbers, as text."""
    return first_names([f"{suffix} {count}" for suffix, count in passed_over.most_common()])


def explain_failure(
    paths: list[str], error: Exception, data: Path, reason_of: Callable[[str], str | None]
) -> DataError:
    """Return the error for a batch that could not be read: it names the first image that is broken.

    data: the folder with train and val. reason_of: returns what is wrong with the image at a path, if
    anything. error: what the decoder said of the batch.
    """
    for path in paths:
        if reason := reason_of(path):
            what, advice = f"broken image {path}: {reason}", "repair it or remove it; "
            break
    else:
        what, advice = f"cannot read one of {first_names(paths)}: {dali_error_line(error)}", ""
    return DataError(f"{what}; {advice}{verify_command(data)} finds all broken images")


def verify_command(data: Path, report: Path | None = None) -> str:
    """Return the command line that verifies the images below `data`."""
    words = ["rsnet", "verify", str(data)]
    return shlex.join(words if report is None else [*words, "--report", str(report)])


def decode_error(path: str) -> str | None:
    """Return why PIL cannot decode the image at `path`, None if it can. Raises RunError."""
    try:
        load_rgb(path)
    except DataError as error:
        return str(error)
    return None


def dali_error_line(error: Exception) -> str:
    """Return the line of DALI's message that says what went wrong: the one after "encountered:"."""
    lines = str(error).partition("encountered:")[2].split("\n")
    return next((line.strip() for line in lines if line.strip()), first_line(error))

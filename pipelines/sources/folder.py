"""Image folders, one sub-folder per class, as torchvision's ImageFolder reads them; broken images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from pipelines.image_io import SUFFIXES, find_images, folders_in, images_below, list_folder
from pipelines.sources.options import NO_OPTIONS, SplitOptions
from pipelines.sources.source import REPORT, Source, count_text
from pipelines.utils.errors import UsageError, error_context
from pipelines.utils.location import location
from pipelines.utils.reading import Stamp, file_stamp, read_file
from pipelines.utils.text import distinct, first_names


@dataclass(frozen=True)
class ImageFolder(Source):
    """The images of one split; classes and paths are sorted.

    `labels[i]`, an index into `classes`, is that of `paths[i]`.
    """

    root: Path
    paths: list[str]
    is_part: bool = False
    """Whether it is a split that was made of the folder's images."""

    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of files below the class folders that are no images, by suffix."""

    has_files: ClassVar[bool] = True

    @property
    def place(self) -> str:
        """The folder, and the split that was made of it."""
        return f"{self.root} ({self.split})" if self.is_part else str(self.root)

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

    @property
    def report(self) -> Path:
        """verified.json in the folder that has train and val, or that has the classes."""
        return Path(self.data) / REPORT

    def stamps(self) -> dict[str, Stamp]:
        """Return sizes and times; takes 5 s for a million images. Raises RunError."""
        return {name: file_stamp(path) for name, path in zip(self.names, self.paths, strict=True)}

    def read(self, index: int) -> bytes:
        """Return an image's bytes. Raises DataError if there are none, RunError if it cannot be read."""
        return read_file(self.paths[index])

    def locate(self, index: int) -> str:
        """Return an image's path."""
        return self.paths[index]

    def subset(self, kept: Sequence[int], split: str | None = None) -> Self:
        """Return the folder with these images alone, but with all its classes."""
        is_part = self.is_part or split is not None
        return self._take(kept, split, paths=[self.paths[i] for i in kept], is_part=is_part)


def scan_folder(root: Path) -> ImageFolder:
    """Find the images below the class folders of `root`, at any depth.

    Its name tells the split; where it is neither train nor val, `root` has no splits, and is train.

    Raises UsageError if `root` is missing, holds no class folders, or a class holds no image; RunError if
    a folder cannot be listed.
    """
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}")
    entries = list_folder(root)
    folders = [Path(path).name for path, kind in entries if kind == "folder"]
    classes = [name for name in folders if not name.startswith((".", "@"))]
    if not classes:
        what = "images but no class folders" if images_below(root) else "no images"
        raise UsageError(f"{root} holds {what}; expected {root}/CLASS/IMAGE.JPEG")
    _require_different([root / name for name in classes])
    found = find_images([root / name for name in classes])
    beside = sum(
        kind == "file" and path.lower().endswith(SUFFIXES) and not Path(path).name.startswith(".")
        for path, kind in entries
    )
    passed_over = Counter({"images beside the class folders": beside} if beside else {})
    for name, (images, others) in zip(classes, found, strict=True):
        passed_over += others
        if not images:
            what = f" ({_kinds(others)} are none)" if others else ""
            raise UsageError(
                f"the class folder {root / name} holds no image{what}: remove it, in train and val, or add "
                "some"
            )
    paths = [path for images, _ in found for path in images]
    labels = np.repeat(np.arange(len(classes)), [len(images) for images, _ in found])
    is_split = root.name in ("train", "val")
    return ImageFolder(
        data=root.parent if is_split else root,
        split=root.name if is_split else "train",
        classes=classes,
        labels=labels,
        root=root,
        paths=paths,
        passed_over=passed_over,
    )


def scan_train_val(data: Path, with_train: bool = True) -> tuple[ImageFolder | None, ImageFolder]:
    """Return `data`/train, None without `with_train`, and `data`/val.

    Raises UsageError if one is missing or malformed, or their classes differ.
    """
    if not data.is_dir():
        raise UsageError(f"--data: there is no folder {data}")
    splits = ("train", "val") if with_train else ("val",)
    for split in splits:
        if not (data / split).is_dir():
            found = folders_in(data)[:5]
            others = "; --val-data or --val-fraction give others" if found == ["train"] else ""
            raise UsageError(
                f"--data: {data} has no folder {split!r} "
                f"(it has {', '.join(found) if found else 'no folders'}){others}"
            )
    with error_context("--data"):
        val = scan_folder(data / "val")
        train = scan_folder(data / "train") if with_train else None
    if train is None:
        return None, val
    if train.classes != val.classes:
        lone = {
            "train": {*train.classes} - {*val.classes},
            "val": {*val.classes} - {*train.classes},
        }
        differing = "; ".join(
            f"only in {split}: {first_names([distinct(name) for name in sorted(names)])}"
            for split, names in lone.items()
            if names
        )
        advice = f"; with --data {data}/train --val-data {data}/val some classes are enough in val"
        raise UsageError(
            f"--data: the classes of {data}/train and {data}/val differ: {differing}"
            f"{'' if lone['val'] else advice}"
        )
    return train, val


def require_apart_of_both(output: Path, data: str | Path, options: SplitOptions) -> None:
    """Raise as `require_apart`, for the images of --data and of --val-data."""
    require_apart(output, data, whole=options != NO_OPTIONS)
    if options.val_data is not None:
        require_apart(output, options.val_data, whole=True, flag="--val-data")


def require_apart(output: Path, data: str | Path, *, whole: bool, flag: str = "--data") -> None:
    """Raise UsageError if --output lies among the images of a folder, where it is taken for a class.

    data: of the option `flag`; if it is no folder, nothing is said. whole: without train/ and val/ its
    folders are the classes.
    """
    with error_context(flag):
        place = location(data)
    if not isinstance(place, Path) or not place.is_dir():
        return
    roots = [place / split for split in ("train", "val") if (place / split).is_dir()]
    has_files = any(path.suffix in (".beton", ".tar") for path in place.iterdir())
    if whole and not roots and not has_files:
        roots = [place]
    for root in roots:
        if output.resolve().is_relative_to(root.resolve()):
            raise UsageError(
                f"--output: {output} lies among the images of {root}; name another folder"
            )


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

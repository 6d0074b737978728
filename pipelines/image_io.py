"""Find image files; cut evaluation's view with PIL."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from pipelines.transforms import eval_short_side
from pipelines.utils.reading import reading

# torchvision's, and two more names of JPEGs.
SUFFIXES = (*IMG_EXTENSIONS, ".jfif", ".jpe")

Kind = Literal["folder", "file", "special"]  # special: a pipe, a socket, a device


class Found(NamedTuple):
    """The image files below a folder, sorted, and the number of its other files by their suffix."""

    images: list[str]
    passed_over: Counter[str]


def images_below(folder: Path) -> list[str]:
    """Return the images of `find_images` below one folder."""
    (found,) = find_images([folder])
    return found.images


def find_images(roots: Sequence[Path]) -> list[Found]:
    """Find the files with an image's suffix below each of the folders, at any depth.

    Hidden files do not count. Folders whose names begin with a dot or @ are skipped, as other programs keep
    copies and thumbnails there. Symbolic links to folders are followed, unless they lead to a parent or to
    a folder that is entered anyway.

    Raises RunError if a folder cannot be listed.
    """
    entered = {os.path.realpath(root) for root in roots}
    found = [Found([], Counter()) for _ in roots]
    links: list[tuple[Found, str]] = []
    for root, result in zip(roots, found, strict=True):
        links += [(result, link) for link in _walk(str(root), entered, result)]
    while links:  # after all folders that are no links, so that an image is found where it lies
        result, link = links.pop(0)
        target = os.path.realpath(link)
        is_above = Path(link).parent.resolve().is_relative_to(target)
        if target not in entered and not is_above:
            entered.add(target)
            links += [(result, further) for further in _walk(link, entered, result)]
    for result in found:
        result.images.sort()
    return found


def list_folder(folder: str | Path) -> list[tuple[str, Kind]]:
    """Return the paths in a folder, sorted, and what each is, or links to: also a dangling link is a file.

    Raises RunError if that cannot be told: os.walk would leave the entry out.
    """
    with reading(folder), os.scandir(folder) as entries:
        return sorted((entry.path, _kind(entry)) for entry in entries)


def folders_in(folder: str | Path) -> list[str]:
    """Return the names of the folders, and of links to some, in a folder, sorted. Raises as `list_folder`."""
    return [Path(path).name for path, kind in list_folder(folder) if kind == "folder"]


def eval_image(image: Image.Image, size: int) -> Image.Image:
    """Return evaluation's view of an image: resized, and its centre of `size` x `size` pixels."""
    resized = F.resize(image, [eval_short_side(size)], InterpolationMode.BILINEAR)
    centre: Image.Image = F.center_crop(resized, [size])
    return centre


def _walk(root: str, entered: set[str], result: Found) -> list[str]:
    """Add the files below `root` to `result`, and its folders' real paths to `entered`; return its links."""
    links: list[str] = []
    left = [(root, os.path.realpath(root))]
    while left:
        folder, real = left.pop()
        for path, kind in list_folder(folder):
            name = path[len(folder.rstrip("/")) + 1 :]
            if kind == "special" and not name.startswith("."):
                result.passed_over["no regular file"] += 1
            elif kind == "file":
                _count(path, name, result)
            elif name.startswith((".", "@")):
                continue
            elif os.path.islink(path):  # noqa: PTH114
                links.append(path)
            elif (below := f"{real.rstrip('/')}/{name}") not in entered:
                entered.add(below)
                left.append((path, below))
    return links


def _count(path: str, name: str, result: Found) -> None:
    """Add a file to the images or to those passed over."""
    if name.startswith("."):
        result.passed_over["hidden"] += 1
    elif name.lower().endswith(SUFFIXES):
        result.images.append(path)
    else:
        result.passed_over[os.path.splitext(name)[1].lower() or "without suffix"] += 1  # noqa: PTH122


def _kind(entry: os.DirEntry[str]) -> Kind:
    try:
        with reading(entry.path):
            if entry.is_dir():
                return "folder"
            # Whoever opens a pipe waits for ever.
            is_file = entry.is_file() or not os.path.exists(entry.path)  # noqa: PTH110
            return "file" if is_file else "special"
    except OSError:  # a link that leads nowhere
        return "file"

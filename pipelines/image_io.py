"""Find image files; cut evaluation's view with PIL."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from pipelines.transforms import eval_short_side
from pipelines.utils.reading import reading


def images_below(folder: Path) -> list[str]:
    """Return the sorted paths of the image files below `folder`, linked folders included.

    A link to one of its own parent folders is not followed. Raises RunError if a folder cannot be listed.
    """
    found, left = [], [str(folder)]
    while left:
        for path, is_folder in list_folder(left.pop()):
            if is_folder:
                left += [] if _leads_back(path) else [path]
            elif path.lower().endswith(IMG_EXTENSIONS):
                found.append(path)
    return sorted(found)


def list_folder(folder: str | Path) -> list[tuple[str, bool]]:
    """Return the paths in a folder, sorted, and whether each is a folder or a link to one.

    Raises RunError if that cannot be told: os.walk would leave the entry out.
    """
    with reading(folder), os.scandir(folder) as entries:
        return sorted((entry.path, _is_folder(entry)) for entry in entries)


def eval_image(image: Image.Image, size: int) -> Image.Image:
    """Return evaluation's view of an image: resized, and its centre of `size` x `size` pixels."""
    resized = F.resize(image, [eval_short_side(size)], InterpolationMode.BILINEAR)
    centre: Image.Image = F.center_crop(resized, [size])
    return centre


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        with reading(entry.path):
            return entry.is_dir()
    except OSError:  # a link that leads nowhere
        return False


def _leads_back(path: str) -> bool:
    """Return whether a path is a link to one of its own parent folders."""
    link = Path(path)
    return link.is_symlink() and link.parent.resolve().is_relative_to(link.resolve())

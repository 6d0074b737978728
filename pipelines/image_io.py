"""Find and open image files; cut evaluation's view with PIL."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from pipelines.transforms import eval_short_side

# The formats of IMG_EXTENSIONS, and GIF. PIL goes by the first bytes, whatever the name, and would also take
# PostScript, on which it runs Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


def images_below(folder: Path) -> list[str]:
    """Return the sorted paths of the image files below `folder`, linked folders included.

    A link to one of its own parent folders is not followed.
    """
    found = []
    for directory, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _leads_back(f"{directory}/{name}")]
        found += [
            os.path.join(directory, name) for name in names if name.lower().endswith(IMG_EXTENSIONS)
        ]
    return sorted(found)


def open_image(path: str | Path) -> Image.Image:
    """Open an image file of one of `FORMATS`; only its header is read.

    Raises OSError, and what else PIL raises for a damaged header.
    """
    state = Path(path).stat()
    if not stat.S_ISREG(state.st_mode):  # opening a pipe would block
        raise OSError("it is no regular file")
    if state.st_size == 0:
        raise OSError("the file is empty")
    return Image.open(path, formats=FORMATS)


def eval_image(image: Image.Image, size: int) -> Image.Image:
    """Return evaluation's view of an image: resized, and its centre of `size` x `size` pixels."""
    resized = F.resize(image, [eval_short_side(size)], InterpolationMode.BILINEAR)
    centre: Image.Image = F.center_crop(resized, [size])
    return centre


def _leads_back(path: str) -> bool:
    """Return whether a path is a link to one of its own parent folders."""
    link = Path(path)
    return link.is_symlink() and link.parent.resolve().is_relative_to(link.resolve())

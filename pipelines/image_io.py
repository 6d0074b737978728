"""A picture as an evaluation sees it, decoded and cut by PIL; which files are pictures."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from pipelines.transforms import eval_short_side


def images_below(folder: Path) -> list[str]:
    """Sorted paths of the image files below `folder`, folders that are links included.

    A link to a folder that it lies in is not followed.
    """
    found = []
    for directory, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _leads_back(f"{directory}/{name}")]
        found += [
            os.path.join(directory, name) for name in names if name.lower().endswith(IMG_EXTENSIONS)
        ]
    return sorted(found)


def _leads_back(path: str) -> bool:
    link = Path(path)
    return link.is_symlink() and link.parent.resolve().is_relative_to(link.resolve())


# What IMG_EXTENSIONS stand for, and GIF. PIL goes by the first bytes, whatever the name, and would also take
# PostScript, which it runs Ghostscript on.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


def open_image(path: str | Path) -> Image.Image:
    """The picture in a file of one of `FORMATS`, of which only the header was read.

    Raises what PIL does, and OSError.
    """
    state = Path(path).stat()
    if not stat.S_ISREG(state.st_mode):  # to open a pipe would be to wait for ever
        raise OSError("it is no regular file")
    if state.st_size == 0:
        raise OSError("the file is empty")
    return Image.open(path, formats=FORMATS)


def eval_picture(image: Image.Image, size: int) -> Image.Image:
    """The `size` x `size` pixels of a picture that an evaluation looks at."""
    resized = F.resize(image, [eval_short_side(size)], InterpolationMode.BILINEAR)
    centre: Image.Image = F.center_crop(resized, [size])
    return centre

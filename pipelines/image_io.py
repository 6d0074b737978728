"""Find and open image files; cut evaluation's view with PIL."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from pipelines.transforms import eval_short_side
from pipelines.utils.errors import DataError, first_line
from pipelines.utils.reading import cannot_read, read_file, reading

# The formats of IMG_EXTENSIONS, and GIF. PIL goes by the first bytes, whatever the name, and would also take
# PostScript, on which it runs Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


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


def open_image(data: bytes) -> Image.Image:
    """Open the content of an image file of one of `FORMATS`; only its header is decoded.

    A file is read as a whole before: what PIL raises is the file's fault then, not that of the disk.

    Raises DataError if it is no such image, or its header is damaged.
    """
    with decode_errors():
        return Image.open(io.BytesIO(data), formats=FORMATS)


@contextmanager
def decode_errors() -> Iterator[None]:
    """Raise DataError for what PIL raises in the block; MemoryError is no fault of the file."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"cannot identify image file, which is none of {', '.join(FORMATS)}"
        ) from None
    except Exception as error:  # OSError, SyntaxError, struct.error, ... by format
        raise DataError(first_line(error)) from error


def load_rgb(path: str | Path) -> Image.Image:
    """Read and decode an image file.

    Raises DataError if it is broken, RunError if the system does not let it be read or decoded.
    """
    data = read_file(path)
    with memory_errors(path), open_image(data) as image, decode_errors():
        return image.convert("RGB")


@contextmanager
def memory_errors(path: str | Path) -> Iterator[None]:
    """Raise RunError, with the file's path, if the memory does not suffice for the block."""
    try:
        yield
    except MemoryError:
        raise cannot_read(path, "not enough memory to decode it") from None


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

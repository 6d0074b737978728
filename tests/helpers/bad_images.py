"""Image files that DALI cannot decode, and the loaders that meet them."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import torch
from PIL import Image

from pipelines import dali
from pipelines.batch import LoaderSpec


def decode_with_pil(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def write_html(path: Path) -> None:
    path.write_text("<html>404</html>")


def write_png_without_its_end(path: Path) -> None:
    file = io.BytesIO()
    decode_with_pil(path).save(file, "PNG")
    path.write_bytes(file.getvalue()[:-12])
    decode_with_pil(path)


def write_gif(path: Path) -> None:
    decode_with_pil(path).save(path, "GIF")
    decode_with_pil(path)


def make_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = {
    empty: "the file is empty",
    truncate: "image file is truncated",
    write_html: "cannot identify image file",
    write_png_without_its_end: "PIL decodes it, but DALI does not",
    write_gif: "PIL decodes it, but DALI does not",
    make_dangling: "No such file or directory",
}


def damage_all(data: Path) -> dict[str, str]:
    """Damage an image of train in each way; return their paths below train, and the reasons."""
    names = [f"ant/{i:03}.JPEG" for i in range(0, 2 * len(DAMAGES), 2)]
    for name, damage in zip(names, DAMAGES, strict=True):
        damage(data / "train" / name)
    return dict(zip(names, DAMAGES.values(), strict=True))


def touch(path: Path) -> None:
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def loaders_of(data: Path, rank: int = 0, with_train: bool = True, **options):
    spec = LoaderSpec(data, (32, 24), 4, torch.device("cpu"), rank=rank, world_size=rank + 1)
    return dali.make_loaders(dali.DaliOptions(workers=2, **options), spec, with_train)


def forbid_reading(monkeypatch, path: Path, code: int = errno.EACCES) -> None:
    """Let reading this file or listing this folder fail, as for any user but root, and on a bad disk."""

    def refusing(function):
        def call(at, *arguments, **options):
            if isinstance(at, str | Path) and Path(at) == path:
                raise OSError(code, os.strerror(code), str(at))
            return function(at, *arguments, **options)

        return call

    monkeypatch.setattr(Path, "read_bytes", refusing(Path.read_bytes))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))

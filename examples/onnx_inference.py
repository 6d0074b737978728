"""Classify images with ONNX Runtime, without PyTorch: needs numpy, pillow and onnxruntime alone.

    rsnet export RELEASE --format onnx --one-file --output onnx
    python examples/onnx_inference.py onnx/model.onnx SIZE IMAGE...

SIZE: a resolution of the file, in pixels. It takes files of a single size (model-SIZE.onnx), too. Copy it to
where it is needed: it imports nothing of this repository.

Expected: a line per image, as "photo.jpg: NAME PERCENT %". Tests hold that the pixels are those of the
trainer's evaluation, bit for bit, and the logits the network's to 1e-4.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]


def main(model: str, size: str, *paths: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = read_metadata(session)
    sizes = about["sizes"] if "sizes" in about else [about["size"]]
    if int(size) not in sizes:
        sys.exit(f"size {size}: {model} has {' '.join(map(str, sizes))}")
    images = np.stack([normalize(load_pixels(path, int(size), about), about) for path in paths])
    for path, row in zip(paths, run(session, images, int(size)), strict=True):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        best = int(probabilities.argmax())
        name = about["classes"][best] if best < len(about["classes"]) else best
        print(f"{path}: {name} {100 * probabilities[best]:.1f} %")


def read_metadata(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """Return what the exporter wrote into the file: "preprocessing", "classes", "sizes" or "size", ..."""
    return {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}


def load_pixels(path: str, size: int, about: dict[str, Any]) -> Array:
    """Return the (size, size, 3) uint8 pixels, RGB, that an evaluation of the trainer sees, bit for bit.

    The short side is resized to short_sides[size] by PIL's BILINEAR, which is antialiased, and the centre is
    cut out: torchvision's Resize and CenterCrop. Rotation by EXIF is ignored, as in training.
    """
    short = about["preprocessing"]["short_sides"][str(size)]
    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = (short * side // min(image.size) for side in image.size)
    # round() goes to the even number from the middle, as torchvision's does.
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def normalize(pixels: Array, about: dict[str, Any]) -> Array:
    """(size, size, 3) uint8 -> (3, size, size) float32, with mean and std of RGB in [0, 1]."""
    mean, std = (np.array(about["preprocessing"][key], np.float32) for key in ("mean", "std"))
    return ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)


def run(session: onnxruntime.InferenceSession, images: Array, size: int) -> Array:
    """(N, 3, size, size) -> (N, classes), the logits."""
    inputs = {"images": images, "size": np.array(size)}
    names = [value.name for value in session.get_inputs()]  # a file of one size has no input "size"
    logits: Array = session.run(["logits"], {name: inputs[name] for name in names})[0]
    return logits


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

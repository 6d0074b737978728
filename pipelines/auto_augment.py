"""TrivialAugmentWide and RandAugment by torchvision's operations, drawn from a sample's own numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional as F

from pipelines.batch import AutoAugment

MAGNITUDES = 31  # of both kinds
OPERATIONS_OF = {"trivial": 1, "rand": 2}  # an image

# Uniform numbers that a sample takes: of each operation its kind, magnitude and sign.
LANES = 3 * max(OPERATIONS_OF.values())


def _affine(image: Image.Image, **change: list[float]) -> Image.Image:
    unchanged = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    changed: Image.Image = F.affine(image, **(unchanged | change))
    return changed


def _degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))


# By torchvision's names; in the order of DALI's suites, so that both take the same one.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "TranslateX": lambda x, m: _affine(x, translate=[int(m), 0]),
    "TranslateY": lambda x, m: _affine(x, translate=[0, int(m)]),
    "ShearX": lambda x, m: _affine(x, shear=[_degrees(m), 0.0], center=[0, 0]),
    "ShearY": lambda x, m: _affine(x, shear=[0.0, _degrees(m)], center=[0, 0]),
    "Rotate": F.rotate,
    "Brightness": lambda x, m: F.adjust_brightness(x, 1 + m),
    "Contrast": lambda x, m: F.adjust_contrast(x, 1 + m),
    "Color": lambda x, m: F.adjust_saturation(x, 1 + m),
    "Sharpness": lambda x, m: F.adjust_sharpness(x, 1 + m),
    "Posterize": lambda x, m: F.posterize(x, int(m)),
    "Solarize": F.solarize,
    "Equalize": lambda x, _: F.equalize(x),
    "AutoContrast": lambda x, _: F.autocontrast(x),
    "Identity": lambda x, _: x,
}

# The largest magnitude, which may be negative; of a translation in pixels, or of the side.
_LARGEST = {
    "trivial": {"Translate": 32.0, "Shear": 0.99, "Rotate": 135.0, "": 0.99},
    "rand": {"Translate": 150 / 331, "Shear": 0.3, "Rotate": 30.0, "": 0.9},
}
_FEWEST_BITS = {"trivial": 2, "rand": 4}


def augment(
    image: Image.Image, kind: AutoAugment, rand_magnitude: int, numbers: NDArray[np.float64]
) -> Image.Image:
    """Apply the operations that `numbers`, (LANES,) in [0, 1), choose.

    rand_magnitude: of RandAugment, 0 to MAGNITUDES - 1.
    """
    names = list(OPERATIONS)
    for operation, magnitude, sign in numbers.reshape(-1, 3).tolist()[: OPERATIONS_OF[kind]]:
        name = names[int(operation * len(names))]
        level = rand_magnitude if kind == "rand" else int(magnitude * MAGNITUDES)
        side = image.width if name == "TranslateX" else image.height
        image = OPERATIONS[name](image, _magnitude(kind, name, level, side, sign < 0.5))
    return image


def _magnitude(kind: AutoAugment, name: str, level: int, side: int, negative: bool) -> float:
    """Return what torchvision makes of the magnitude `level`, in the units of the operation."""
    if name == "Posterize":
        return round(8 - level * (8 - _FEWEST_BITS[kind]) / (MAGNITUDES - 1))
    if name == "Solarize":
        return 255 * _level(1.0, 0.0, level)
    group = name.rstrip("XY")
    largest = _LARGEST[kind].get(group, _LARGEST[kind][""])
    if group == "Translate" and kind == "rand":
        largest *= side
    # DALI counts a shear the other way round.
    return _level(0.0, largest, level) * (-1 if negative != (group == "Shear") else 1)


def _level(first: float, last: float, level: int) -> float:
    return torch.linspace(first, last, MAGNITUDES)[level].item()  # float32: torchvision's rounding

"""A small release whose sizes disagree, and labelled photos for it, made in a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.release import package as release
from tests.conftest import write_photo

SIZES = (64, 48, 32)
CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
NETWORK = {
    "arch": "parallel_resnet10",
    "width_mult": 0.25,
    "stem": "imagenet",
    "norm": "private",
    "blurpool": False,
    "mode": "resnet",
    "qw": 32,
    "qa": 32,
    "tf_padding": False,
    "sizes": list(SIZES),
    "num_classes": 8,
    "classes": CLASSES,  # the last class has no name
    "normalize": "imagenet",
    "eval_crop_ratio": 0.875,
    "interpolation": "triangle, antialiased (PIL's BILINEAR)",
}


def write(folder: Path, accuracy: dict | None = None, **changes: object) -> Path:
    """A release of random weights in which no two BatchNorms are alike."""
    torch.manual_seed(5)
    network = NETWORK | changes
    model = create_model(ModelConfig.from_dict(network))
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                value.uniform_(0.5, 1.5)
    names = [*map(str, network["sizes"]), "ensemble"]
    release.write(
        folder, network, model,
        gmacs=dict.fromkeys(names, 1.0), accuracy=accuracy, averaged=False, source={},
    )  # fmt: skip
    return folder


def write_photos(root: Path) -> Path:
    """Ten photos of each class, in class folders."""
    for i in range(70):
        write_photo(root / CLASSES[i % 7] / f"{i}.jpg", 60 + i % 9, 80 - i % 5, seed=i)
    return root


def pixels(photo: Path, size: int) -> torch.Tensor:
    """(size, size, 3) uint8 that an evaluation sees, by PIL alone."""
    with Image.open(photo) as opened:
        image = opened.convert("RGB")
    short = int(size / 0.875)
    width, height = (short * side // min(image.size) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return torch.tensor(np.array(resized.crop((left, top, left + size, top + size))))

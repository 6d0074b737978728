"""A small release whose sizes disagree, made in a moment."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rsnet import release
from rsnet.models.zoo import rebuild

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
    model = rebuild(network)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                value.uniform_(0.5, 1.5)
    names = [*map(str, network["sizes"]), "ensemble"]
    release.write(
        folder, network, model,
        gflops=dict.fromkeys(names, 1.0), accuracy=accuracy, averaged=False, source={},
    )  # fmt: skip
    return folder

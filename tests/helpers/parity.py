"""The numbers of the original implementation, and networks in the state that they were computed from.

tests/data/parity/*.json: eval and training logits, losses and four SGD steps of the original models, in
float32 on a CPU, from formulas instead of stored weights (see `state_of`).
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.models.switchable import ResolutionSwitchable, SwitchableBatchNorm2d

FOLDER = Path(__file__).parents[1] / "data" / "parity"


@cache
def numbers(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


def wave(shape: tuple[int, ...], k: int) -> Tensor:
    count = math.prod(shape)
    return torch.from_numpy(np.sin(_angles(1 << count.bit_length())[:count] + k)).reshape(shape)


@cache
def _angles(count: int) -> NDArray[np.float64]:
    """At least as many as an array needs: half of a large network's numbers are these."""
    j = np.arange(count, dtype=np.float64)
    return 1 + 0.7 * j + 0.3 * np.sin(0.001 * j**2)


def state_of(keys: dict[str, list[int]]) -> dict[str, Tensor]:
    """The original's state: the k-th name in sorted order holds a wave of phase k."""
    state = {}
    for k, (name, dims) in enumerate(sorted(keys.items())):
        shape = tuple(dims)
        if name.endswith("num_batches_tracked"):
            continue
        value = wave(shape, k)
        if len(shape) == 4:
            value = value * math.sqrt(2 / math.prod(shape[1:]))
        elif len(shape) == 2:
            value = value * math.sqrt(1 / shape[1])
        elif name == "alpha":
            value = 1 + 0.5 * value
        elif name.endswith("running_var"):
            value = 1 + 0.2 * value
        elif name.endswith("running_mean"):
            value = 0.05 * value
        elif ".bn_" in name and name.endswith("weight"):
            value = 1 + 0.1 * value
        else:
            value = 0.1 * value
        state[name] = value.float()
    return state


def original_names(model: ResolutionSwitchable, keys: dict[str, list[int]]) -> dict[str, str]:
    """{original name: ours}. Both list their layers in the same order, so they are matched by kind."""
    ours: dict[str, list[str]] = {"conv": [], "norm": [], "linear": []}
    for name, module in model.named_modules():
        if isinstance(module, SwitchableBatchNorm2d):
            ours["norm"].append(name)
        elif isinstance(module, nn.Conv2d):
            ours["conv"].append(name)
        elif isinstance(module, nn.Linear):
            ours["linear"].append(name)
    theirs: dict[str, list[str]] = {"conv": [], "norm": [], "linear": []}
    for key, dims in keys.items():
        layer = key.split(".bn_")[0] if ".bn_" in key else key.rpartition(".module.")[0]
        kind = "norm" if ".bn_" in key else "conv" if len(dims) == 4 else "linear"
        if layer and layer not in theirs[kind]:
            theirs[kind].append(layer)
    pairs = {"alpha": "alpha"}
    for kind in ours:
        order = sorted(theirs[kind], key=_in_network_order)
        for layer, mine in zip(order, ours[kind], strict=True):
            for key in keys:
                if key.startswith(layer + ".bn_"):
                    pairs[key] = key.replace(layer + ".bn_", mine + ".by_resolution.")
                elif key.startswith(layer + ".module."):
                    pairs[key] = key.replace(layer + ".module.", mine + ".")
    return pairs


def _in_network_order(layer: str) -> list[Any]:
    """A block's shortcut comes after its other layers; MobileNetV2's last `conv` after its features."""
    first = {"conv": 2}.get(layer.split(".")[0], 1)
    parts = [
        (0, int(p), "") if p.isdigit() else (p == "downsample", 0, p) for p in layer.split(".")
    ]
    return [first if len(parts) > 1 else 0 if layer in ("conv1", "bn1") else 3, *parts]


def network(arch: str) -> ResolutionSwitchable:
    """Our network of that name, in the original's state."""
    n = numbers(arch)
    model = create_model(ModelConfig(arch, n["num_classes"], n["sizes"]))
    names = original_names(model, n["keys"])
    state = {names[k]: v for k, v in state_of(n["keys"]).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(m.endswith("num_batches_tracked") for m in missing)
    return model


def images(arch: str) -> tuple[Tensor, ...]:
    n = numbers(arch)
    return tuple(
        (0.5 + 0.5 * wave((n["batch"], 3, s, s), i)).float() for i, s in enumerate(n["sizes"])
    )


LABELS = torch.tensor([3, 1, 4, 1])

"""One size's weights as the state dict of an ordinary network of torchvision or timm."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import get_model_builder

from pipelines.utils.atomic_io import atomic_write, atomic_write_json
from pipelines.utils.errors import UsageError
from rsnet.config.model_config import MODEL_DEFAULTS, ModelConfig
from rsnet.models.factory import builder_options, is_variant, library_name
from rsnet.models.pretrained import require_timm

Library = Literal["torchvision", "timm"]

SUFFIXES = (".safetensors", ".pth")


def describe(library: Library, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return which network of the library takes the weights, by its name and its builder's arguments.

    config: a release's. Raises UsageError, which says why, if the library has no such network.
    """
    network = ModelConfig.from_dict(config["network"])
    if reason := _difference(network) or _lack(library, network):
        raise UsageError(f"--format {library}: {library} has no such network: {reason}")
    own, name = library_name(network.arch)
    every = builder_options(network.arch, network.num_classes, network.width_mult)
    arguments = every if own == library else {"num_classes": network.num_classes}
    return {"library": library, "architecture": name, "arguments": arguments}


def preparation(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return how an image is prepared, by the names that torchvision's transforms and timm have."""
    prepared = config["preprocessing"]
    return {
        "size": size,
        "resize_size": prepared["short_sides"][str(size)],
        "crop_size": size,
        "crop_pct": prepared["crop_ratio"],
        "interpolation": "bilinear",
        "antialias": True,
        "mean": prepared["mean"],
        "std": prepared["std"],
    }


def write(path: Path, network: nn.Module, about: Mapping[str, Any]) -> None:
    """Write the state dict of one size's network beside `path`: .safetensors and .pth, and about.json's
    content, which is also the metadata of the .safetensors, as .json.
    """
    state = network.state_dict()
    for name, value in state.items():  # one of its own for each, as safetensors wants it
        state[name] = value.clone(memory_format=torch.contiguous_format)
    # safetensors has texts alone as metadata.
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    atomic_write(
        path.with_suffix(".safetensors"),
        safetensors.torch.save(dict(state), {"format": "pt", **metadata}),
    )
    pth = io.BytesIO()
    torch.save(state, pth)
    atomic_write(path.with_suffix(".pth"), pth.getbuffer())
    atomic_write_json(path.with_suffix(".json"), dict(about))


def load(path: Path, about: Mapping[str, Any]) -> Callable[[Tensor, int], Tensor]:
    """Return a function, (images, size) -> logits, of the library's own network with a .pth's weights.

    It computes in the memory format of the images. Raises RuntimeError if the network has other layers.
    """
    network = _build(about["library"], about["architecture"], about["arguments"])
    with path.open("rb") as file:
        network.load_state_dict(torch.load(file, weights_only=True), strict=True)
    network.eval()

    def run(images: Tensor, size: int) -> Tensor:  # noqa: ARG001
        layout = torch.channels_last
        is_last = images.is_contiguous(memory_format=layout)
        network.to(memory_format=layout if is_last else torch.contiguous_format)
        return network(images)  # type: ignore[no-any-return]

    return run


def _difference(network: ModelConfig) -> str:
    """Return what no library's network has; "" if there is nothing."""
    if network.is_quantized:
        return f"it is quantized (--qw {network.qw} --qa {network.qa}); --format onnx has it"
    for name in ("mode", "stem", "blurpool", "tf_padding"):
        value = getattr(network, name)
        if value != MODEL_DEFAULTS[name]:
            flag = f"--{name.replace('_', '-')}"
            given = flag if value is True else f"{flag} {value}"
            return f"it was trained with {given}; --format onnx has it"
    return ""


def _lack(library: Library, network: ModelConfig) -> str:
    """Return why the library has no network of that name and width; "" if it has."""
    own, name = library_name(network.arch)
    if own == "torchvision" and is_variant(name, network.width_mult):
        width = f" --width-mult {network.width_mult:g}" * (network.width_mult != 1.0)
        return f"{network.arch}{width}; --format onnx has it"
    if own != library and (network.width_mult != 1.0 or not _has(library, name)):
        return f"{network.arch}; --format {own} has it"
    return ""


def _has(library: Library, name: str) -> bool:
    if library == "timm":
        timm = require_timm("--format timm")
        return bool(timm.is_model(name))
    try:
        get_model_builder(name)
    except ValueError:
        return False
    return True


def _build(library: Library, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    if library == "timm":
        network: nn.Module = require_timm("--format timm").create_model(
            name, pretrained=False, **arguments
        )
        return network
    return get_model_builder(name)(weights=None, **arguments)  # type: ignore[no-any-return]

"""Networks of one size as exporters take them, and as torch.export's programs, loaded by torch alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.utils.atomic_io import atomic_write
from rsnet.models.fold import fold_batchnorm, plain
from rsnet.models.quantization.encode import level_table
from rsnet.models.quantization.lq_nets import ActivationQuantizer
from rsnet.models.switchable import ResolutionSwitchable

FORMAT, SUFFIX = "torch.export", ".pt2"


class Levels(nn.Module):
    """`ActivationQuantizer` as a binary search: a comparison and a look-up for each bit."""

    thresholds: Tensor
    levels: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.bits = quantizer.bits
        thresholds, levels, _ = level_table(quantizer.basis, quantizer.codes)
        self.register_buffer("thresholds", thresholds[0])
        self.register_buffer("levels", levels[0])

    def forward(self, x: Tensor) -> Tensor:
        number = torch.zeros_like(x, dtype=torch.int64)
        for step in (2**bit for bit in reversed(range(self.bits))):
            number = torch.where(x > self.thresholds[number + step], number + step, number)
        return self.levels[number]


def traceable(model: ResolutionSwitchable, size: int, fold: bool) -> nn.Module:
    """Return the network of one size, (N, 3, size, size) -> (N, classes), of ordinary operations.

    fold: BatchNorm goes into the convolutions. Raises what `rsnet.models.fold` does.
    """
    network = fold_batchnorm(model, size) if fold else plain(model, size)
    for name, module in list(network.named_modules()):
        if isinstance(module, ActivationQuantizer):
            network.set_submodule(name, Levels(module))
    return network.requires_grad_(False)


def write(path: Path, network: nn.Module, size: int, about: Mapping[str, Any]) -> None:
    """Write a program of one size: float32 (N, 3, size, size) to (N, classes). about: JSON stored in it."""
    images = torch.zeros(2, 3, size, size)
    batch = ({0: torch.export.Dim("N")},)
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=batch)
    for node in program.graph.nodes:  # paths on this machine
        node.meta.pop("stack_trace", None)
    data = io.BytesIO()  # into a file, a full disk would be a fault of the exporter's
    torch.export.save(program, data, extra_files={"about.json": json.dumps(about)})
    atomic_write(path, data.getbuffer())


def load(path: Path) -> Callable[[Tensor, int], Tensor]:
    """Return a function, (images, size) -> logits, that runs the program in a file on the CPU."""
    with path.open("rb") as file:  # torch's own reader takes paths that are text alone
        module = torch.export.load(file).module()

    def run(images: Tensor, size: int) -> Tensor:  # noqa: ARG001
        with torch.no_grad():
            return module(images)  # type: ignore[no-any-return]

    return run

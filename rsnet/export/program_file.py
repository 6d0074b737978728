"""Networks as PyTorch's exported programs: a file for each size, loaded by torch alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT, SUFFIX = "torch.export", ".pt2"


def write(path: Path, network: nn.Module, size: int, about: Mapping[str, Any]) -> None:
    """One size: float32 (N, 3, size, size) to (N, classes). about: JSON beside it, as `about.json`."""
    images = torch.zeros(2, 3, size, size)
    batch = ({0: torch.export.Dim("N")},)
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=batch)
    for node in program.graph.nodes:  # paths on this machine
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})


def logits(path: Path, images: Tensor, size: int) -> Tensor:  # noqa: ARG001
    """What the program in a file computes on the CPU."""
    with torch.no_grad():
        return torch.export.load(path).module()(images)  # type: ignore[no-any-return]

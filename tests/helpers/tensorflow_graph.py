"""The networks of the original's quantized training code, written plainly, as TensorFlow computes them.

Arrays are in TensorFlow's layout: pictures (N, h, w, channels), filters (h, w, in, out). A variable is made,
from random numbers, when the graph first meets it, under the name that it has there.
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BLOCKS = {18: ([2, 2, 2, 2], False), 34: ([3, 4, 6, 3], False), 50: ([3, 4, 6, 3], True)}


def padding(length: int, kernel: int, stride: int) -> tuple[int, int]:
    """SAME, before and after: TensorFlow's manual, tf.nn, "Notes on padding"."""
    covered = stride if length % stride == 0 else length % stride
    total = max(kernel - covered, 0)
    return total // 2, total - total // 2


def same(x: Tensor, kernel: int, stride: int, value: float) -> Tensor:
    rows, columns = (padding(n, kernel, stride) for n in x.shape[1:3])
    return F.pad(x, (0, 0, *columns, *rows), value=value)


class Graph:
    """mode: resnet, preact or preact_typeA. qw, qa: bits, 32 for none."""

    def __init__(self, depth: int, mode: str, qw: int, qa: int, classes: int = 10) -> None:
        self.counts, self.bottleneck = BLOCKS[depth]
        self.mode, self.qw, self.qa, self.classes = mode, qw, qa, classes
        self.variables: dict[str, Tensor] = {}
        self._random = np.random.default_rng(depth)

    def network(self, image: Tensor, size: int) -> Tensor:
        """(N, s, s, 3), BGR -> (N, classes)."""
        x = self.conv_bn(image, "imagenet/conv0", 64, 7, 2, size, quantized=False).relu()
        x = same(x, 3, 2, -torch.inf).unfold(1, 3, 2).unfold(2, 3, 2).amax((-2, -1))
        for i, count in enumerate(self.counts):
            group = f"imagenet/group{i}"
            for j in range(count):
                stride = 2 if j == 0 and i > 0 else 1
                x = self.block(x, f"{group}/block{j}", 64 * 2**i, stride, size, first=j == 0)
            if self.mode != "resnet":
                x = self.norm(x, f"{group}/bn-last{size:03}/bn").relu()
            if self.mode == "preact" and i < 3:
                x = self.quantized(x, f"{group}/quant_last")
        x = x.mean((1, 2))
        w = self.variable("imagenet/linear/W", (x.shape[1], self.classes), x.shape[1] ** -0.5)
        return x @ w + self.variable("imagenet/linear/b", (self.classes,), 0.1)

    def block(
        self, x: Tensor, name: str, width: int, stride: int, size: int, first: bool
    ) -> Tensor:
        shortcut = x
        if self.mode != "resnet":
            if not first:
                x = self.norm(x, f"{name}/bn-preact{size:03}/bn").relu()
            if not first or self.mode == "preact_typeA" or "group0" in name:
                x = self.quantized(x, f"{name}/quant1")
        shape = [(width, 3, stride), (width, 3, 1)]
        if self.bottleneck:
            shape = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
        for i, (out, kernel, step) in enumerate(shape, start=1):
            x = self.conv_bn(x, f"{name}/conv{i}", out, kernel, step, size)
            if i < len(shape):
                x = x.relu()
                if self.mode != "resnet":
                    x = self.quantized(x, f"{name}/quant{i + 1}")
        out = shape[-1][0]
        if shortcut.shape[-1] != out:
            if self.mode == "preact_typeA":
                pooled = shortcut.unfold(1, stride, stride).unfold(2, stride, stride).mean((-2, -1))
                shortcut = F.pad(pooled, (0, out - pooled.shape[-1]))
            else:
                shortcut = self.conv_bn(shortcut, f"{name}/convshortcut", out, 1, stride, size)
        x = x + shortcut
        return x.relu() if self.mode == "resnet" else x

    def conv_bn(
        self, x: Tensor, name: str, out: int, kernel: int, stride: int, size: int, quantized=True
    ) -> Tensor:
        shape = (kernel, kernel, x.shape[-1], out)
        w = self.variable(f"{name}/W", shape, (2 / (kernel * kernel * out)) ** 0.5)
        if quantized and self.qw < 32:
            basis = self.basis(
                f"{name}/weight_quant/basis", self.qw, out, w.std() * 0.6745 * 2.0 ** (1 - self.qw)
            )
            w = nearest(w, basis, lowest=-1.0)
        y = F.conv2d(
            same(x, kernel, stride, 0.0).permute(0, 3, 1, 2), w.permute(3, 2, 0, 1), stride=stride
        )
        return self.norm(y.permute(0, 2, 3, 1), f"{name}/bn{size:03}")

    def norm(self, x: Tensor, name: str) -> Tensor:
        gamma, beta, mean, variance = (
            self.variable(f"{name}/{leaf}", (x.shape[-1],), deviation, middle)
            for leaf, deviation, middle in (
                ("gamma", 0.1, 1.0),
                ("beta", 0.1, 0.0),
                ("mean/EMA", 0.1, 0.0),
                ("variance/EMA", 0.05, 1.0),
            )
        )
        return (x - mean) / (variance + 1e-5).sqrt() * gamma + beta

    def quantized(self, x: Tensor, name: str) -> Tensor:
        if self.qa == 32:
            return x
        step = torch.tensor(0.6745 * 2 / (2**self.qa - 1))
        return nearest(
            x, self.basis(f"{name}/ActivationQuantization/basis", self.qa, 1, step), lowest=0.0
        )

    def basis(self, name: str, bits: int, channels: int, lowest: Tensor) -> Tensor:
        start = (lowest * 2.0 ** torch.arange(bits))[:, None]
        return self.variable(name, (bits, channels), 0.1, 1.0, start)

    def variable(
        self,
        name: str,
        shape: tuple[int, ...],
        deviation: Any,
        middle: float = 0.0,
        unit: Any = 1.0,
    ) -> Tensor:
        if name not in self.variables:
            values = self._random.normal(middle, float(deviation), shape)
            self.variables[name] = torch.tensor(values, dtype=torch.float32) * unit
        assert self.variables[name].shape == shape, name
        return self.variables[name]


def nearest(x: Tensor, basis: Tensor, lowest: float) -> Tensor:
    """Values (..., C or any) by bases (K, C or 1) as levels, of codes of {lowest, 1}."""
    codes = torch.tensor(list(product((lowest, 1.0), repeat=len(basis))))
    levels = (codes @ basis).sort(dim=0).values  # (L, C)
    y = torch.zeros_like(x) + (levels[0] if lowest < 0 else 0.0)
    for below, above in pairwise(levels):
        y = torch.where(x > (below + above) / 2, above, y)
    return y


def saved(graph: Graph, sizes: tuple[int, ...], debiased: int | None = None) -> dict[str, Tensor]:
    """What a checkpoint of a training for `sizes` has, its optimizer and summaries included.

    debiased: the updates of the bases' moving averages, if the file tells.
    """
    for size in sizes:
        graph.network(torch.zeros(1, size, size, 3), size)
    model = graph.variables
    slots = {f"{n}/Momentum": torch.zeros(v.shape) for n, v in model.items() if n.endswith("/W")}
    averages = {}
    for name, basis in model.items():
        if name.endswith("/basis") and debiased is not None:
            prefix = f"{name.removesuffix('/basis')}/{name}"
            averages[f"{prefix}/biased"] = basis * (1 - 0.9**debiased)
            averages[f"{prefix}/local_step"] = torch.tensor(float(debiased))
    return {
        **model,
        **slots,
        **averages,
        "alpha": torch.linspace(1.5, 0.5, len(sizes)),
        "alpha/Momentum": torch.zeros(len(sizes)),
        "global_step": torch.tensor(500000),
        "learning_rate": torch.tensor(1e-6),
        "EMA/cost/biased": torch.zeros(()),
    }

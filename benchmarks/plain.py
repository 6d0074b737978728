"""Baseline: a training step that works as the original code does.

Float32, NCHW; a list of tensors, one per resolution, goes through the network layer by layer; SGD updates one
parameter after the other. Written anew, from torchvision's network, for the benchmarks alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


class ListOfResolutions(fx.Interpreter):
    """Runs each layer of a network on all resolutions before the next; BatchNorm is private to each."""

    def __init__(self, network: nn.Module, resolutions: int) -> None:
        super().__init__(fx.symbolic_trace(network))
        self.norms = {
            name: nn.ModuleList(copy.deepcopy(module) for _ in range(resolutions))
            for name, module in network.named_modules()
            if isinstance(module, nn.BatchNorm2d)
        }

    def run_node(self, n: fx.Node) -> Any:
        """Every node's value is a list with one entry per resolution."""
        if n.op == "placeholder":
            return super().run_node(n)
        if n.op == "output":
            return self.env[n.args[0]]  # type: ignore[index]
        args = [self.env[a] if isinstance(a, fx.Node) else a for a in n.args]
        count = len(next(a for a in args if isinstance(a, list)))
        each = [[a[i] if isinstance(a, list) else a for a in args] for i in range(count)]
        if n.op == "call_module":
            name = str(n.target)
            layers = self.norms.get(name) or [self.fetch_attr(name)] * count
            return [layer(*a) for layer, a in zip(layers, each, strict=True)]
        call: Callable[..., Any] = n.target  # type: ignore[assignment]
        if n.op == "call_method":
            return [getattr(a[0], str(n.target))(*a[1:], **n.kwargs) for a in each]
        return [call(*a, **n.kwargs) for a in each]


class PlainStep:
    """Forward, losses, one backward and an update, on batches of S x (N, 3, s, s) float32, NCHW."""

    def __init__(
        self, network: nn.Module, resolutions: int, lr: float, momentum: float, weight_decay: float
    ) -> None:
        self._network = ListOfResolutions(network.train(), resolutions)
        self._alpha = nn.Parameter(
            torch.ones(resolutions, device=next(network.parameters()).device)
        )
        norms = {
            id(p)
            for m in network.modules()
            if isinstance(m, nn.BatchNorm2d)
            for p in m.parameters()
        }
        shared = [p for p in network.parameters() if id(p) not in norms]
        private = [p for layers in self._network.norms.values() for p in layers.parameters()]
        self._sgd = torch.optim.SGD(
            [*shared, *private, self._alpha], lr, momentum, weight_decay=weight_decay, foreach=False,
            fused=False,
        )  # fmt: skip

    def __call__(self, images: Sequence[Tensor], labels: Tensor) -> float:
        """Return the loss, as the original does after every step."""
        logits = self._network.run(list(images))
        loss = self._loss(logits, labels)
        self._sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._sgd.step()
        return loss.item()

    def _loss(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        weights = self._alpha.softmax(0)
        ensemble = torch.zeros_like(logits[0])
        for weight, z in zip(weights, logits, strict=True):
            ensemble = ensemble + weight * z.detach()
        loss = F.cross_entropy(ensemble, labels)
        for i, z in enumerate(logits):
            loss = loss + F.cross_entropy(z, labels)
            for teacher in (ensemble, *logits[:i]):
                p = teacher.detach().softmax(1)
                pair = (p * (p.log() - F.log_softmax(z, 1))).sum(1).mean()
                loss = loss + 2 / (len(logits) + 1) * pair
        return loss

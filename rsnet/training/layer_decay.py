"""Layer-wise decay of the learning rate (`--layer-decay`), as timm has it, for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from rsnet.models.switchable import ResolutionSwitchable


def lr_scales(model: ResolutionSwitchable, layer_decay: float) -> dict[nn.Parameter, float]:
    """Return the factor of the learning rate of each parameter of the network: `layer_decay` to the power of
    the layers behind its own, so that the classifier has 1, and the stem the smallest (Bao et al. 2022,
    "BEiT", and timm). alpha, which is behind all layers, is left out.
    """
    layers = layers_of(model.network)
    last = max(layers.values())
    return {
        parameter: layer_decay ** (last - layers.get(name, last))
        for name, parameter in model.network.named_parameters()
    }


def layers_of(network: nn.Module) -> dict[str, int]:
    """Return the layer of each parameter of a switchable network, by name, from 0, the stem's, to the
    classifier's.

    timm's networks say themselves what belongs together. Of others, a layer is a block, that is a member of
    the outermost `nn.Sequential`s, or what stands alone, with the BatchNorm that follows a convolution. The
    last of the network's own parts is the classifier, whole. The private BatchNorms of a layer are in it.
    """
    matcher: Any = getattr(network, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        return dict(group_parameters(network, matcher(coarse=False), reverse=True))
    found: dict[str, int] = {}
    layer = -1
    for prefix, block in _blocks(network):
        parameters = dict(block.named_parameters(prefix))
        layer += any(p.ndim > 1 for p in parameters.values())
        for name in parameters:
            found.setdefault(name, max(layer, 0))
    return found


def _blocks(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    *body, head = [(n, m) for n, m in network.named_children() if any(True for _ in m.parameters())]
    for name, part in body:
        yield from _members(name, part)
    yield head


def _members(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        for member, child in module.named_children():
            yield from _members(f"{name}.{member}", child)
    else:
        yield name, module

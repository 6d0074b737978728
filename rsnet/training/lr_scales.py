"""Factors of single parameters' learning rates: `--layer-decay`, as timm has it, and `--norm-lr-mult`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rsnet.models.switchable import ResolutionSwitchable


def lr_scales(
    model: ResolutionSwitchable, layer_decay: float = 1.0, norm_lr_mult: float = 1.0
) -> dict[nn.Parameter, float]:
    """Return the factor of the learning rate of each parameter of the network: `layer_decay` to the power of
    the layers behind its own, so that the classifier has 1, and the stem the smallest (Bao et al. 2022,
    "BEiT", and timm), times `norm_lr_mult` in BatchNorm. alpha, which is behind all layers, is left out.

    Shared weights get the gradient of all sizes summed, a private BatchNorm that of its own size only. With
    `norm_lr_mult` equal to the number of sizes, BatchNorm learns as fast relative to the shared weights as
    in a single-size network.
    """
    layers = layers_of(model.network)
    last = max(layers.values())
    norms = [m for m in model.network.modules() if isinstance(m, _BatchNorm)]
    of_norms = {parameter for norm in norms for parameter in norm.parameters()}
    return {
        parameter: layer_decay ** (last - layers.get(name, last))
        * (norm_lr_mult if parameter in of_norms else 1.0)
        for name, parameter in model.network.named_parameters()
    }


def layers_of(network: nn.Module) -> dict[str, int]:
    """Return the layer of each parameter of a switchable network, by name, from 0, the stem's, to the
    classifier's.

    timm networks define the grouping themselves (`group_matcher`). In others a layer is a member of an
    outermost `nn.Sequential`, or a module outside of one together with the BatchNorm after it. The last
    child of the network is the classifier. Private BatchNorms belong to the layer they are in.
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

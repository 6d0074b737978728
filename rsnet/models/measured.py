"""Parameters and costs of networks by name, measured without memory for their weights."""

from __future__ import annotations

from torch import nn
from torchvision.models import get_model_weights

from rsnet.config.model_config import TIMM_PREFIX, ModelConfig
from rsnet.config.networks import PIXELS, Network
from rsnet.models.factory import WeightsOnMeta, build_ordinary, library_name
from rsnet.models.shapes import gmacs


def measure(arch: str) -> Network | None:
    """Measure the ordinary network of 1000 classes; return None for one without BatchNorm.

    Raises UsageError for an unknown one.
    """
    with WeightsOnMeta():
        network = build_ordinary(ModelConfig(arch, 1000, (PIXELS,)))
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return None
    try:
        cost = round(gmacs(network, PIXELS), 4)
    except Exception:  # of a network that takes images of another size alone, whatever it raises
        cost = None
    count = sum(parameter.numel() for parameter in network.parameters())
    return Network(arch, count, cost, _weights(arch))


def _weights(arch: str) -> tuple[str, ...]:
    _, name = library_name(arch)
    if not arch.startswith(TIMM_PREFIX):
        try:
            return tuple(weights.name for weights in get_model_weights(name))
        except ValueError:  # of ours, as ResNet-10
            return ()
    import timm

    tags = timm.list_pretrained(f"{name}.*") if timm.models.is_model_pretrained(name) else []
    return tuple(tag.partition(".")[2] for tag in tags)

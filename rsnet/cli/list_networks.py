"""`rsnet list`: the networks that --arch takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from rsnet.config.networks import Network


@dataclass(frozen=True)
class Options:
    """List the networks that --arch takes, with their parameters, cost and published weights.

    Parameters are of the ordinary network with 1000 classes; each size adds a BatchNorm of its own. GMACs are
    of an image of 224 pixels, the multiply-accumulates that papers call FLOPs. Weights: for --pretrained.
    """

    pattern: Positional[Annotated[tuple[str, ...], arg(metavar="PATTERN")]] = ()
    """Names, with * and ?, or parts of them: mobilenet, 'resnet*'. timm/PATTERN lists timm's networks, which
    are measured one by one. Unset: all of torchvision's."""

    json: bool = False
    """One line of JSON per network in place of the table."""


def run(options: Options) -> int:
    from rsnet.config.model_config import PREFIX

    patterns = [pattern.removeprefix(PREFIX) for pattern in options.pattern]
    ours = [pattern for pattern in patterns if not pattern.startswith("timm")]
    theirs = [
        pattern.removeprefix("timm").lstrip("/") for pattern in patterns if pattern not in ours
    ]
    if not options.json:
        print(_line("name", "parameters, M", "GMACs", "weights"))
    for network in _found(ours, theirs):
        print(json.dumps(asdict(network)) if options.json else _row(network), flush=True)
    return 0


def _found(ours: list[str], theirs: list[str]) -> Iterator[Network]:
    """Yield torchvision's networks that fit one of the patterns, or all without any, and timm's."""
    from rsnet.config.networks import matching, torchvision_networks

    if ours or not theirs:
        networks = {network.name: network for network in torchvision_networks()}
        yield from (networks[name] for name in matching(networks, ours))
    if theirs:
        yield from _of_timm(theirs)


def _of_timm(patterns: list[str]) -> Iterator[Network]:
    import timm

    from rsnet.config.model_config import TIMM_PREFIX
    from rsnet.config.networks import matching
    from rsnet.models.measured import measure

    for name in matching(timm.list_models(), patterns):
        if (network := measure(TIMM_PREFIX + name)) is not None:
            yield network


def _row(network: Network) -> str:
    cost = "" if network.gmacs is None else f"{network.gmacs:.2f}"
    weights = " ".join(network.weights) or "none"
    return _line(network.name, f"{network.parameters / 1e6:.1f}", cost, weights)


def _line(name: str, parameters: str, gmacs: str, weights: str) -> str:
    return f"{name:36} {parameters:>13} {gmacs:>8}  {weights}"

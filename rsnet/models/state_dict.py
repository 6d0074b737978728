"""A further resolution for the weights of a trained network, made of those that it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def neighbours(trained: Sequence[int], size: int) -> dict[int, float]:
    """The trained sizes on both sides of `size`, with their shares in it by distance; beyond the largest
    or the smallest, that one alone."""
    below, above = [s for s in trained if s < size], [s for s in trained if s > size]
    if not below or not above:
        return {min(above) if above else max(below): 1.0}
    low, high = max(below), min(above)
    return {high: (size - low) / (high - low), low: (high - size) / (high - low)}


def add_size(
    state: Mapping[str, Tensor], trained: Sequence[int], size: int, shares: Mapping[int, float]
) -> dict[str, Tensor]:
    """`state`, of sizes `trained` (largest first), with another one, whose BatchNorm (gamma, beta, mean,
    variance) is the sum of those of `shares`.

    Everything else stays as it is. The ensemble stays one of the trained sizes: the new one's alpha is
    -inf, its weight 0.
    """
    sizes = sorted([*trained, size], reverse=True)
    new = sizes.index(size)
    grown: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, infix, tail = key.partition(".by_resolution.")
        if not infix:
            grown[key] = value
            continue
        index, leaf = tail.split(".", 1)
        grown[f"{layer}{infix}{sizes.index(trained[int(index)])}.{leaf}"] = value
        if index == "0":
            parts = {s: state[f"{layer}{infix}{trained.index(s)}.{leaf}"] for s in shares}
            grown[f"{layer}{infix}{new}.{leaf}"] = _mean(parts, shares)
    alpha = state["alpha"]
    grown["alpha"] = torch.cat([alpha[:new], torch.full_like(alpha[:1], -torch.inf), alpha[new:]])
    return grown


def _mean(parts: Mapping[int, Tensor], shares: Mapping[int, float]) -> Tensor:
    """The weighted mean; a copy if there is one part, or if it is a count."""
    first = next(iter(parts.values()))
    if len(parts) == 1 or not first.is_floating_point():
        return first.clone()
    return torch.stack([shares[s] * part for s, part in parts.items()]).sum(0)

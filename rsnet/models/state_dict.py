"""State dicts of switchable networks: what fits, some of the sizes, one size more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def neighbour_shares(trained: Sequence[int], size: int) -> dict[int, float]:
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


LISTED = 12  # names in a message


def describe_mismatch(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> str:
    """What is missing, unknown, or of another shape than `expected`; "" if all fits.

    A count of batches may be missing: PyTorch before 0.4.1 had none.
    """
    problems = [
        f"{name} {shape} is missing"
        for name, shape in expected.items()
        if name not in state and not name.endswith("num_batches_tracked")
    ]
    problems += [f"{n} {tuple(v.shape)} is unknown" for n, v in state.items() if n not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return "; ".join(problems[:LISTED]) + more


def select_sizes(
    state: dict[str, Tensor],
    trained: Sequence[int],
    wanted: Sequence[int],
    shared_norm: bool = False,
) -> dict[str, Tensor]:
    """The part of a state dict of sizes `trained` (largest first) that a network of `wanted` needs.

    Raises ValueError if one of `wanted` is not among `trained`.
    """
    missing = [s for s in wanted if s not in trained]
    if missing:
        raise ValueError(f"sizes {missing} are not among the trained {list(trained)}")
    source = [list(trained).index(size) for size in sorted(wanted, reverse=True)]
    part: dict[str, Tensor] = {}
    for key, value in state.items():
        head, infix, tail = key.partition(".by_resolution.")
        if not infix or shared_norm:
            part[key] = value
            continue
        index, rest = tail.split(".", 1)
        if int(index) in source:
            part[f"{head}.by_resolution.{source.index(int(index))}.{rest}"] = value
    part["alpha"] = state["alpha"][source]
    if not part["alpha"].isfinite().any():  # sizes that were added, whose weight is 0 beside others
        part["alpha"] = torch.ones_like(part["alpha"])
    return part

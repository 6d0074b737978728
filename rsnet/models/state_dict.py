"""State dicts of switchable networks: a selection of the sizes, an additional size, and what does not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipelines.utils.errors import DataError

LISTED = 12  # names in a message

# In the names of private layers: LAYER.by_resolution.INDEX.NAME, see `SwitchableBatchNorm2d`.
_INFIX = ".by_resolution."


def select_sizes(
    state: dict[str, Tensor],
    trained: Sequence[int],
    wanted: Sequence[int],
    shared_norm: bool = False,
) -> dict[str, Tensor]:
    """Return the part of a state dict of sizes `trained` (largest first) that a network of `wanted` needs.

    Raises ValueError if one of `wanted` is not among `trained`.
    """
    missing = [s for s in wanted if s not in trained]
    if missing:
        raise ValueError(f"sizes {missing} are not among the trained {list(trained)}")
    return take_sizes(state, trained, wanted, shared_norm)[0]


def take_sizes(
    state: Mapping[str, Tensor],
    trained: Sequence[int],
    wanted: Sequence[int],
    shared_norm: bool = False,
) -> tuple[dict[str, Tensor], dict[int, int]]:
    """Return the state dict of a network of sizes `wanted`, made of one of sizes `trained` (largest first),
    and, by size, the trained one whose BatchNorm it gets: its own, or else that of the nearest.

    The alpha of a size that was not trained is -inf, see `ResolutionSwitchable.complete_alpha`.

    Raises DataError if the state is not one of the sizes `trained`.
    """
    _require_of(state, len(trained), shared_norm)
    sources = {}
    for size in sorted(wanted, reverse=True):
        sources[size] = nearest_size(trained, size)
    taken: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, infix, tail = key.partition(_INFIX)
        if not infix or shared_norm:
            taken[key] = value
            continue
        index, name = tail.split(".", 1)
        for i, source in enumerate(sources.values()):
            if trained.index(source) == int(index):
                taken[f"{layer}{infix}{i}.{name}"] = value
    alpha = state["alpha"]
    none = alpha.new_tensor(-torch.inf)
    taken["alpha"] = torch.stack(
        [alpha[trained.index(s)] if s in trained else none for s in sources]
    )
    if (
        not taken["alpha"].isfinite().any()
    ):  # sizes that were added, whose weight is 0 beside others
        taken["alpha"] = torch.ones_like(taken["alpha"])
    return taken, sources


def _require_of(state: Mapping[str, Tensor], count: int, shared_norm: bool) -> None:
    """Raise DataError if a state dict is not one of so many sizes: others' BatchNorm would be taken."""
    alpha = state.get("alpha")
    if alpha is None or alpha.shape != (count,):
        found = "no alpha" if alpha is None else f"an alpha of shape {tuple(alpha.shape)}"
        raise DataError(f"it has {found}, for {count} sizes")
    places = {key.partition(_INFIX)[2].partition(".")[0] for key in state if _INFIX in key}
    if places and not shared_norm and places != set(map(str, range(count))):
        raise DataError(f"it has BatchNorm of {len(places)} sizes, not {count}")


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of weights on the CPU, whatever file holds them."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.endswith("num_batches_tracked"):  # releases have none
            continue
        value = state[name].detach().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def nearest_size(sizes: Iterable[int], size: int) -> int:
    """Return that of `sizes` which is nearest to `size`; of two, the larger."""
    return min(sizes, key=lambda other: (abs(other - size), -other))


def neighbour_shares(trained: Sequence[int], size: int) -> dict[int, float]:
    """Return the trained sizes next to `size` with their weights in a linear interpolation.

    Beyond the largest or the smallest it is that one alone.
    """
    below, above = [s for s in trained if s < size], [s for s in trained if s > size]
    if not below or not above:
        return {min(above) if above else max(below): 1.0}
    low, high = max(below), min(above)
    return {high: (size - low) / (high - low), low: (high - size) / (high - low)}


def add_size(
    state: Mapping[str, Tensor], trained: Sequence[int], size: int, shares: Mapping[int, float]
) -> dict[str, Tensor]:
    """Return `state`, of sizes `trained` (largest first), with another size.

    shares: {trained size: weight}. The new BatchNorms (gamma, beta, mean, variance) are the weighted sums of
    those of these sizes. Everything else stays as it is, also the ensemble: the new alpha is -inf, its
    weight 0.
    """
    sizes = sorted([*trained, size], reverse=True)
    new = sizes.index(size)
    extended: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, infix, tail = key.partition(_INFIX)
        if not infix:
            extended[key] = value
            continue
        index, name = tail.split(".", 1)
        extended[f"{layer}{infix}{sizes.index(trained[int(index)])}.{name}"] = value
        if index == "0":
            parts = {s: state[f"{layer}{infix}{trained.index(s)}.{name}"] for s in shares}
            extended[f"{layer}{infix}{new}.{name}"] = _weighted_sum(parts, shares)
    alpha = state["alpha"]
    added = torch.full_like(alpha[:1], -torch.inf)
    extended["alpha"] = torch.cat([alpha[:new], added, alpha[new:]])
    return extended


def describe_mismatch(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> str:
    """Describe what is missing, unknown, or of another shape than `expected`; "" if all fits.

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


def _weighted_sum(parts: Mapping[int, Tensor], shares: Mapping[int, float]) -> Tensor:
    """Return the weighted sum; a copy if there is one part, or if it is a count."""
    first = next(iter(parts.values()))
    if len(parts) == 1 or not first.is_floating_point():
        return first.clone()
    return torch.stack([shares[s] * part for s, part in parts.items()]).sum(0)

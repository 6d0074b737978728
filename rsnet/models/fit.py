"""Whether weights fit a network, and if not, what is in the way: names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

LISTED = 12  # names in a message


def misfits(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> str:
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

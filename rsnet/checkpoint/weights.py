"""Weights of a checkpoint for a network: whether they fit, and their loading."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from pipelines.utils.errors import DataError, UsageError
from pipelines.utils.text import distinct
from rsnet.checkpoint.checkpoint import State
from rsnet.config.model_config import FULL, WEIGHT_FIELDS, ModelConfig
from rsnet.models.state_dict import select_sizes
from rsnet.models.switchable import ResolutionSwitchable


def require_match(trained: ModelConfig, wanted: ModelConfig, training: bool) -> None:
    """Raise UsageError if a network `wanted` cannot load the weights of one `trained`.

    Training resumes with the same arch, classes and sizes; an evaluation may take some of the sizes.
    """
    problems = []
    for field in WEIGHT_FIELDS:
        there, here = getattr(trained, field), getattr(wanted, field)
        if there != here:
            flag = "--" + field.replace("_", "-")
            is_start = field in ("qw", "qa") and there == FULL and training
            how = (
                "; to start from it in full precision, give it to --pretrained" if is_start else ""
            )
            problems.append(f"{flag} is {there} there and {here} here{how}")
    # The original's files do not name their classes.
    if not problems and trained.classes and trained.classes != wanted.classes:
        pairs = zip_longest(trained.classes, wanted.classes, fillvalue="missing")
        i, (there, here) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        problems.append(
            f"--data has other classes: class {i} is {distinct(there)} there and "
            f"{distinct(here)} here"
        )
    same = set(trained.sizes) == set(wanted.sizes)
    subset = set(wanted.sizes) <= set(trained.sizes)
    if not (same if training else subset):
        there, here = (" ".join(map(str, config.sizes)) for config in (trained, wanted))
        problems.append(f"--sizes is {there} there and {here} here")
    if problems:
        raise UsageError("; ".join(problems))


def require_finite(weights: State) -> None:
    """Raise DataError if weights to evaluate are not finite."""
    for name, value in weights.items():
        # A size that was added after the training has no part in the ensemble: its alpha is -inf.
        is_wrong = value.isnan() if name == "alpha" else ~value.isfinite()
        if value.is_floating_point() and is_wrong.any():
            raise DataError(
                f"{name} has numbers that are not finite: the training diverged; "
                "take an earlier checkpoint"
            )


def load_weights(model: ResolutionSwitchable, state: State, sizes: Sequence[int]) -> None:
    """Load the state dict of a network of these `sizes` strictly, each BatchNorm by its size.

    Raises DataError that names the parameters which are missing, left over or of another shape.
    """
    selected = select_sizes(dict(state), sizes, model.sizes, model.shared_norm)
    try:
        model.load_state_dict(selected, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DataError(reason) from error

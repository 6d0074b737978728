"""Weights of a checkpoint for a network: whether they fit, and their loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from pipelines.utils.errors import DataError, UsageError, error_context
from rsnet.checkpoint import io
from rsnet.checkpoint.checkpoint import State
from rsnet.config.model_config import FULL, WEIGHT_FIELDS, ModelConfig
from rsnet.models.quantization.lq_nets import full_precision_names, init_quantizers_from_weights
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
            how = "; to start from it in full precision, give it to --init-from" if is_start else ""
            problems.append(f"{flag} is {there} there and {here} here{how}")
    # The original's files do not name their classes.
    if not problems and trained.classes and trained.classes != wanted.classes:
        pairs = zip_longest(trained.classes, wanted.classes, fillvalue="missing")
        i, (there, here) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        problems.append(f"--data has other classes: class {i} is {there} there and {here} here")
    same = set(trained.sizes) == set(wanted.sizes)
    subset = set(wanted.sizes) <= set(trained.sizes)
    if not (same if training else subset):
        there, here = (" ".join(map(str, config.sizes)) for config in (trained, wanted))
        problems.append(f"--sizes is {there} there and {here} here")
    if problems:
        raise UsageError("; ".join(problems))


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


def start_from(model: ResolutionSwitchable, wanted: ModelConfig, path: Path) -> None:
    """Give `model`, described by `wanted`, the weights of a full-precision checkpoint, or their averages.

    Raises UsageError if that is not of the same network, or quantized itself; DataError if it is damaged.
    """
    with error_context("--init-from"):
        checkpoint = io.load(path)
    trained = checkpoint.network
    with error_context(f"--init-from: {path} does not fit"):
        if trained.is_quantized:
            raise UsageError("it is quantized itself; --resume goes on with it")
        require_match(
            dataclasses.replace(trained, qw=wanted.qw, qa=wanted.qa), wanted, training=False
        )
        if trained.normalize != wanted.normalize:
            raise UsageError(
                f"--normalize is {trained.normalize} there and {wanted.normalize} here"
            )
        names = full_precision_names(model)
        weights = {names.get(k, k): v for k, v in checkpoint.eval_weights.items()}
        own = {k: v for k, v in model.state_dict().items() if k not in names.values()}
        load_weights(model, {**own, **weights}, trained.sizes)
    model.complete_alpha()
    init_quantizers_from_weights(model)

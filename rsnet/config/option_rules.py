"""Valid ranges of the training options. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from pipelines.utils.errors import UsageError
from rsnet.config.model_config import BITS, FULL


def require_valid(c: Any) -> None:
    """Raise UsageError for the first option of a `TrainOptions` whose value is wrong by itself."""
    for flag, value, fine, rule in option_rules(c):
        if value is not None and not fine(value):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UsageError(f"{flag} {shown}".rstrip() + f": {rule}")
    if c.evaluate and c.is_profile:
        raise UsageError("--evaluate and --profile: choose one of them")
    if c.compile and c.recompute != "off":
        raise UsageError("--compile and --recompute: choose one; the compiler recomputes by itself")
    if c.evaluate and c.resume is None:
        raise UsageError("--evaluate: say which checkpoint, with --resume PATH or --resume auto")
    if c.evaluate and c.pretrained is not None:
        raise UsageError("--pretrained: a training starts from it; --evaluate takes --resume")


def option_rules(c: Any) -> list[tuple[str, Any, Callable[[Any], bool], str]]:
    """Return (flag, value, predicate, rule) of all that can be checked without data or network."""
    return [
        (
            "--sizes",
            c.sizes,
            _distinct_positive,
            "give one or more sizes, positive and all different",
        ),
        ("--num-classes", c.num_classes, lambda n: n >= 2, "at least 2"),
        ("--width-mult", c.width_mult, _positive, "must be a positive number"),
        ("--qw", c.qw, _bits, "from 1 to 8, or 32 for full precision"),
        ("--qa", c.qa, _bits, "from 1 to 8, or 32 for full precision"),
        ("--ema", c.ema, _share, "must be at least 0 and less than 1"),
        ("--mixup", c.mixup, _of_a_beta, "must be from 0 to 100"),
        ("--cutmix", c.cutmix, _of_a_beta, "must be from 0 to 100"),
        ("--epochs", c.epochs, _positive, "at least 1 epoch is needed"),
        ("--batch-size", c.batch_size, _positive, "at least 1 image is needed"),
        ("--accumulate", c.accumulate, _positive, "at least 1 batch is needed"),
        ("--lr", c.lr, _positive, "must be a positive number"),
        ("--momentum", c.momentum, _share, "must be at least 0 and less than 1"),
        ("--weight-decay", c.weight_decay, _not_negative, "must be 0 or a positive number"),
        ("--step", c.step, _positive, "at least 1 epoch"),
        ("--schedule", c.schedule, lambda s: all(e > 0 for e in s), "epochs are positive"),
        ("--gamma", c.gamma, _positive, "must be a positive number"),
        ("--warmup", c.warmup, _not_negative, "must be 0 or a number of epochs"),
        ("--clip-grad", c.clip_grad, _not_negative, "must be 0 or a positive number"),
        ("--sizes-per-step", c.sizes_per_step, _positive, "at least 2 sizes are needed"),
        ("--label-smoothing", c.label_smoothing, _share, "must be at least 0 and less than 1"),
        (
            "--checkpoint-every",
            c.checkpoint_every,
            _is_interval,
            "a number of updates, or of minutes as in 10m",
        ),
        ("--keep", c.keep, _positive, "at least 1"),
        ("--on-nonfinite", c.on_nonfinite, _is_reaction, "stop, or skip and a number of updates"),
        ("--profile-steps", c.profile_steps, _positive, "at least 1 step"),
        ("--profile-limit", c.profile_limit, _positive, "must be a positive number of seconds"),
        ("--timeout", c.timeout, _positive, "must be a positive number of seconds"),
        ("--seed", c.seed, lambda n: 0 <= n < 2**63, "must be from 0 to 2^63 - 1"),
        ("--log-interval", c.log_interval, _positive, "at least 1 step"),
    ]


def _positive(x: float) -> bool:
    return math.isfinite(x) and x > 0


def _not_negative(x: float) -> bool:
    return math.isfinite(x) and x >= 0


def _share(x: float) -> bool:
    return 0 <= x < 1


def _bits(n: int) -> bool:
    return n in BITS or n == FULL


def _of_a_beta(x: float) -> bool:
    # Beyond, all shares are 1/2, and drawing them takes ever longer.
    return 0 <= x <= 100


def _is_interval(text: str) -> bool:
    return re.fullmatch(r"\d+|\d+(\.\d+)?m", text) is not None


def _is_reaction(words: tuple[str, ...]) -> bool:
    return words == ("stop",) or (
        len(words) == 2 and words[0] == "skip" and words[1].isdecimal() and int(words[1]) > 0
    )


def _distinct_positive(sizes: tuple[int, ...]) -> bool:
    return bool(sizes) and min(sizes) > 0 and len(set(sizes)) == len(sizes)

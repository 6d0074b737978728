"""What the options of a training run may be."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from rsnet.config.model_config import BITS, FULL

if TYPE_CHECKING:
    from rsnet.config.train_config import TrainConfig


def checks(c: TrainConfig) -> list[tuple[str, Any, Any, str]]:
    """(flag, value, predicate, rule) of all that can be checked without data or network."""

    def positive(x: float) -> bool:
        return math.isfinite(x) and x > 0

    def not_negative(x: float) -> bool:
        return math.isfinite(x) and x >= 0

    def share(x: float) -> bool:
        return 0 <= x < 1

    def bits(n: int) -> bool:
        return n in BITS or n == FULL

    def of_a_beta(x: float) -> bool:
        # Beyond, all shares are 1/2, and drawing them takes ever longer.
        return 0 <= x <= 100

    def is_interval(text: str) -> bool:
        return re.fullmatch(r"\d+|\d+(\.\d+)?m", text) is not None

    def is_reaction(words: tuple[str, ...]) -> bool:
        return words == ("stop",) or (
            len(words) == 2 and words[0] == "skip" and words[1].isdecimal() and int(words[1]) > 0
        )

    def distinct_positive(sizes: tuple[int, ...]) -> bool:
        return bool(sizes) and min(sizes) > 0 and len(set(sizes)) == len(sizes)

    return [
        (
            "--sizes",
            c.sizes,
            distinct_positive,
            "give one or more sizes, positive and all different",
        ),
        ("--num-classes", c.num_classes, lambda n: n >= 2, "at least 2"),
        ("--width-mult", c.width_mult, positive, "must be a positive number"),
        ("--qw", c.qw, bits, "from 1 to 8, or 32 for full precision"),
        ("--qa", c.qa, bits, "from 1 to 8, or 32 for full precision"),
        ("--ema", c.ema, share, "must be at least 0 and less than 1"),
        ("--mixup", c.mixup, of_a_beta, "must be from 0 to 100"),
        ("--cutmix", c.cutmix, of_a_beta, "must be from 0 to 100"),
        ("--epochs", c.epochs, positive, "at least 1 epoch is needed"),
        ("--batch-size", c.batch_size, positive, "at least 1 image is needed"),
        ("--accumulate", c.accumulate, positive, "at least 1 batch is needed"),
        ("--lr", c.lr, positive, "must be a positive number"),
        ("--momentum", c.momentum, share, "must be at least 0 and less than 1"),
        ("--weight-decay", c.weight_decay, not_negative, "must be 0 or a positive number"),
        ("--step", c.step, positive, "at least 1 epoch"),
        ("--schedule", c.schedule, lambda s: all(e > 0 for e in s), "epochs are positive"),
        ("--gamma", c.gamma, positive, "must be a positive number"),
        ("--warmup", c.warmup, not_negative, "must be 0 or a number of epochs"),
        ("--clip-grad", c.clip_grad, not_negative, "must be 0 or a positive number"),
        ("--sizes-per-step", c.sizes_per_step, positive, "at least 2 sizes are needed"),
        ("--label-smoothing", c.label_smoothing, share, "must be at least 0 and less than 1"),
        (
            "--checkpoint-every",
            c.checkpoint_every,
            is_interval,
            "a number of updates, or of minutes as in 10m",
        ),
        ("--keep", c.keep, positive, "at least 1"),
        ("--on-nonfinite", c.on_nonfinite, is_reaction, "stop, or skip and a number of updates"),
        ("--profile-steps", c.profile_steps, positive, "at least 1 step"),
        ("--profile-limit", c.profile_limit, positive, "must be a positive number of seconds"),
        ("--timeout", c.timeout, positive, "must be a positive number of seconds"),
        ("--seed", c.seed, lambda n: 0 <= n < 2**63, "must be from 0 to 2^63 - 1"),
        ("--log-interval", c.log_interval, positive, "at least 1 step"),
    ]

"""Valid ranges of the training options. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from pipelines.sources.options import SplitOptions
from pipelines.utils.errors import UsageError
from rsnet.config.bounds import (
    MANY,
    MAX_IMAGES,
    MAX_KEPT,
    MAX_LR,
    MAX_PIXELS,
    MAX_SIZES,
    MAX_WIDTH,
    MIN_WIDTH,
)
from rsnet.config.model_config import BITS, FULL
from rsnet.config.size_schedule import is_schedule

LONG_S = 1e8  # three years; much more is too long for the clocks of gloo and NCCL, which count nanoseconds


def require_valid(c: Any) -> None:
    """Raise UsageError for the first option of a `TrainOptions` whose value is wrong by itself."""
    for flag, value, fine, rule in option_rules(c):
        if value is not None and not fine(value):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UsageError(f"{flag} {shown}".rstrip() + f": {rule}")
    if c.evaluate and c.is_profile:
        raise UsageError("--evaluate and --profile: choose one of them")
    _require_combinable(c)
    SplitOptions(c.val_data, c.val_fraction)  # checks them
    if c.evaluate and c.resume is None:
        raise UsageError("--evaluate: say which checkpoint, with --resume PATH or --resume auto")
    if c.evaluate and c.pretrained is not None:
        raise UsageError("--pretrained: a training starts from it; --evaluate takes --resume")


def _require_combinable(c: Any) -> None:
    """Raise UsageError for two options that exclude each other."""
    if c.compile and c.recompute != "off":
        raise UsageError("--compile and --recompute: choose one; the compiler recomputes by itself")
    if c.cuda_graphs and c.recompute != "off":
        raise UsageError("--cuda-graphs and --recompute: choose one of them")
    if c.fused_bn and c.recompute != "off":
        raise UsageError(
            "--fused-bn and --recompute: choose one; fused BatchNorms recompute themselves"
        )
    if c.fused_bn and c.sync_bn:
        raise UsageError("--fused-bn and --sync-bn: choose one; a fused BatchNorm knows one batch")
    if c.balanced_sampling and c.class_weights == "balanced":
        raise UsageError(
            "--balanced-sampling and --class-weights balanced: choose one; both make up for rare classes"
        )
    if c.balanced_sampling and (c.ra_reps or 1) > 1:
        raise UsageError(
            f"--balanced-sampling and --ra-reps {c.ra_reps}: choose one; both say how often an image comes"
        )


def option_rules(c: Any) -> list[tuple[str, Any, Callable[[Any], bool], str]]:
    """Return (flag, value, predicate, rule) of all that can be checked without data or network."""
    return [
        ("--sizes", c.sizes, _distinct_positive,
         "give one or more sizes, positive and all different, 32 of 4096 pixels at most"),
        ("--num-classes", c.num_classes, _within(2, MANY), "at least 2, and 1000000 at most"),
        ("--width-mult", c.width_mult, lambda x: MIN_WIDTH <= x <= MAX_WIDTH, "must be from 0.01 to 16"),
        ("--qw", c.qw, _bits, "from 1 to 8, or 32 for full precision"),
        ("--qa", c.qa, _bits, "from 1 to 8, or 32 for full precision"),
        ("--ema", c.ema, _share, "must be at least 0 and less than 1"),
        ("--mixup", c.mixup, _of_a_beta, "must be from 0 to 100"),
        ("--cutmix", c.cutmix, _of_a_beta, "must be from 0 to 100"),
        ("--ra-magnitude", c.ra_magnitude, lambda n: 0 <= n <= 30, "must be from 0 to 30"),
        ("--train-size-scale", c.train_size_scale, lambda x: 0.25 <= x <= 1, "must be from 0.25 to 1"),
        ("--random-erase", c.random_erase, _from_0(1), "must be a share from 0 to 1"),
        ("--ra-reps", c.ra_reps, _within(1, 100), "at least 1, and 100 at most"),
        ("--epochs", c.epochs, _within(1, MANY), "at least 1 epoch is needed, and 1000000 at most"),
        ("--batch-size", c.batch_size, _within(1, MAX_IMAGES),
         "at least 1 image is needed, and 65536 at most"),
        ("--accumulate", c.accumulate, _within(1, MANY), "at least 1 batch is needed, and 1000000 at most"),
        ("--lr", c.lr, _above_0(MAX_LR), "must be a positive number, 1000 at most"),
        ("--momentum", c.momentum, _share, "must be at least 0 and less than 1"),
        ("--weight-decay", c.weight_decay, _from_0(1000), "must be 0 or a positive number, 1000 at most"),
        ("--step", c.step, _within(1, MANY), "at least 1 epoch, and 1000000 at most"),
        ("--schedule", c.schedule, lambda s: all(0 < e <= MANY for e in s),
         "epochs are positive, and 1000000 at most"),
        ("--gamma", c.gamma, _above_0(100), "must be a positive number, 100 at most"),
        ("--warmup", c.warmup, _within(0, MANY), "must be 0 or a number of epochs, 1000000 at most"),
        ("--drop-path", c.drop_path, _share, "must be at least 0 and less than 1"),
        ("--layer-decay", c.layer_decay, _above_0(1), "must be above 0, and 1 at most"),
        ("--norm-lr-mult", c.norm_lr_mult, _above_0(100), "must be a positive number, 100 at most"),
        ("--clip-grad", c.clip_grad, _not_negative, "must be 0 or a positive number"),
        ("--sizes-per-step", c.sizes_per_step, lambda n: n > 0, "at least 2 sizes are needed"),
        ("--size-schedule", c.size_schedule, is_schedule,
         "give EPOCHS:SIZE[,SIZE...] of each part, a word of its own, as in 0:128 40:160,128 80:all"),
        ("--teacher-weight", c.teacher_weight, _above_0(1000), "must be a positive number, 1000 at most"),
        ("--teacher-temperature", c.teacher_temperature, _above_0(100),
         "must be a positive number, 100 at most"),
        ("--teacher-size", c.teacher_size, _is_size, "a size from 8 to 4096 pixels, or ensemble"),
        ("--label-smoothing", c.label_smoothing, _share, "must be at least 0 and less than 1"),
        ("--bce-target-thresh", c.bce_target_thresh, _share, "must be at least 0 and less than 1"),
        ("--checkpoint-every", c.checkpoint_every, _is_interval,
         "a number of updates, or of minutes as in 10m, of up to 9 digits"),
        ("--keep", c.keep, _within(1, MAX_KEPT), "at least 1, and 100 at most"),
        ("--on-nonfinite", c.on_nonfinite, _is_reaction,
         "stop, or skip and a number of updates of up to 9 digits"),
        ("--profile-steps", c.profile_steps, _within(1, 10000), "at least 1 step, and 10000 at most"),
        ("--profile-limit", c.profile_limit, _above_0(LONG_S),
         "must be a positive number of seconds, 1e8 at most"),
        ("--timeout", c.timeout, _above_0(LONG_S), "must be a positive number of seconds, 1e8 at most"),
        ("--seed", c.seed, lambda n: 0 <= n < 2**63, "must be from 0 to 2^63 - 1"),
        ("--val-interval", c.val_interval, _within(1, MANY), "at least 1 epoch, and 1000000 at most"),
        ("--log-interval", c.log_interval, _within(1, 10**9), "at least 1 step, and 10^9 at most"),
    ]  # fmt: skip


def _within(least: int, most: int) -> Callable[[int], bool]:
    return lambda n: least <= n <= most


def _above_0(most: float) -> Callable[[float], bool]:
    return lambda x: 0 < x <= most


def _from_0(most: float) -> Callable[[float], bool]:
    return lambda x: 0 <= x <= most


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
    return re.fullmatch(r"[0-9]{1,9}|[0-9]{1,9}(\.[0-9]{1,9})?m", text) is not None


def _is_size(text: str) -> bool:
    is_number = re.fullmatch(r"[1-9][0-9]{0,3}", text) is not None
    return text == "ensemble" or (is_number and 8 <= int(text) <= MAX_PIXELS)


def _is_reaction(words: tuple[str, ...]) -> bool:
    return words == ("stop",) or (
        len(words) == 2
        and words[0] == "skip"
        and re.fullmatch("0*[1-9][0-9]{0,8}", words[1]) is not None
    )


def _distinct_positive(sizes: tuple[int, ...]) -> bool:
    return (
        bool(sizes)
        and min(sizes) > 0
        and max(sizes) <= MAX_PIXELS
        and len(sizes) <= MAX_SIZES
        and len(set(sizes)) == len(sizes)
    )

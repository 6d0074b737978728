"""The trainer that a configuration describes."""

from __future__ import annotations

import torch

from rsnet.config.resolve import ResolvedConfig
from rsnet.distributed import process_group as distributed
from rsnet.models.quantization.bases import Bases
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training.ema import Ema
from rsnet.training.mixup import Mixer
from rsnet.training.objective import Objective, SizeSampler
from rsnet.training.optim import LrSchedule, make_sgd
from rsnet.training.trainer import Trainer

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def make_trainer(
    config: ResolvedConfig,
    model: ResolutionSwitchable,
    num_classes: int,
    steps_per_epoch: int,
    device: torch.device,
) -> Trainer:
    """Objective, optimizer, schedule and all that `config` adds to them; `model` lies on `device`."""
    c = config
    objective = Objective(model, c.kd_type if c.kd else None, c.label_smoothing)
    if c.compile:
        objective.compile(dynamic=False)  # sizes and the private BatchNorms are constants
    return Trainer(
        distributed.wrap(
            objective,
            device,
            all_used=c.sizes_per_step == len(c.sizes) or model.shared_norm,
            # DDP does not take a graph for static of which it skips the reduction.
            static=c.accumulate == 1 and c.sizes_per_step == len(c.sizes),
            compress=c.grad_compress == "bf16",
        ),
        make_sgd(model, c.lr, c.momentum, c.weight_decay, c.decay == "all", c.sgd == "nesterov"),
        LrSchedule(
            lr=c.lr,
            decay=c.lr_decay,
            steps=c.epochs * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            warmup_steps=c.warmup * steps_per_epoch,
            gamma=c.gamma,
            step_epochs=c.step,
            milestones=c.schedule,
        ),
        device,
        AMP_DTYPES[c.amp],
        c.accumulate,
        c.clip_grad or None,
        SizeSampler(c.sizes, c.sizes_per_step, c.seed).at,
        # Each rank's batch has draws of its own.
        Mixer(c.mixup, c.cutmix, num_classes, c.seed + (distributed.rank() << 32))
        if c.mixup or c.cutmix
        else None,
        Ema(model, c.ema) if c.ema else None,
        c.most_skipped,
        Bases(model) if c.is_quantized else None,
    )

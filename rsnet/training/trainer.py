"""The training step, which holds the only backward call, and `make_trainer`, which builds a `Trainer` from
the options.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.batch import Batch
from pipelines.utils.errors import RunError, UsageError
from rsnet.config.resolve import ResolvedConfig
from rsnet.config.size_schedule import step_sets
from rsnet.distributed import process_group as distributed
from rsnet.models.autocast import AMP_DTYPES, autocast
from rsnet.models.quantization.lq_nets import BasisUpdater
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.models.teacher import Teacher
from rsnet.training.cuda_graph import UpdateGraphs
from rsnet.training.drop_path import DropPathSampler
from rsnet.training.loss_meter import LossMeter
from rsnet.training.mixup import Mixup
from rsnet.training.nonfinite import GRADIENTS, BatchNormBackup, FiniteGuard
from rsnet.training.objective import Objective, SizeSampler
from rsnet.training.optim import LrSchedule, ModelEma, make_optimizer, set_lr


class Trainer:
    """Objective, optimizer and the other state that training changes and a checkpoint stores.

    amp: the autocast dtype, or None for float32. float16 comes with a loss scaler.
    accumulate: batches whose gradients make up one update.
    clip_grad: largest norm of the gradients, or None.
    sizes_at: optimizer step -> the sizes that take part in it, or None for all.
    mix: (batch, its number in the training) -> a batch of mixed samples.
    most_skipped: consecutive updates that may be skipped because of a non-finite loss or gradient.
    bases: updates the bases of learned quantizers after every optimizer step.
    teacher: a frozen network that teaches every size; it sees each batch as it was mixed.
    drop_path: draws which residual branches each sample skips.
    cuda_graphs: run updates as CUDA graphs; not supported with `sizes_at`, `bases` or DDP. say: called with
    a message if the capture fails.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LrSchedule,
        device: torch.device,
        amp: torch.dtype | None = None,
        *,
        accumulate: int = 1,
        clip_grad: float | None = None,
        sizes_at: Callable[[int], Sequence[int] | None] = lambda _step: None,
        mix: Callable[[Batch, int], Batch] | None = None,
        ema: ModelEma | None = None,
        most_skipped: int = 0,
        bases: BasisUpdater | None = None,
        teacher: Teacher | None = None,
        drop_path: DropPathSampler | None = None,
        cuda_graphs: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.schedule = schedule
        self.device = device
        self.amp = amp
        self.accumulate = accumulate
        self.clip_grad = clip_grad
        self.sizes_at = sizes_at
        self.mix = mix
        self.ema = ema
        self.bases = bases
        self.teacher = teacher
        self.drop_path = drop_path
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        self.guard = FiniteGuard(device, most_skipped)
        self.means = LossMeter()  # since the last report
        self.graphs = UpdateGraphs(optimizer, self.scaler, device, say) if cuda_graphs else None
        self._statistics = BatchNormBackup(objective) if most_skipped else None
        self.step = 0
        self._batches = 0  # since the last update

    def forward_backward(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        """Add the gradients of one batch. last: whether it completes an update. Does not synchronise. With
        CUDA graphs, the graph of the last batch includes the optimizer step.
        """
        if self.mix is not None:
            batch = self.mix(batch, self.step * self.accumulate + self._batches)
        if self.drop_path:
            self.drop_path.draw(self.step, self._batches, self.device)
        first = self._batches == 0
        self._batches += 1
        if self.graphs is None:
            return self._add_gradients(batch, first, last)

        def compute(batch: Batch, step: Tensor) -> dict[str, Tensor]:
            terms = self._add_gradients(batch, first, last)
            if last:
                self._optimize(step)
            return terms

        rate = self.schedule.at(self.step)
        return self.graphs.run(compute, batch, (first, last), rate, self.step)

    def update(self) -> None:
        """Do one optimizer step, which is skipped on the device if `found_inf` is 1."""
        set_lr(self.optimizer, self.schedule.at(self.step))
        if self.graphs is None:
            self._optimize(self.step)
        if self.ema is not None:
            self.ema.update(self.step)
        self.step += 1
        self._batches = 0

    def _add_gradients(self, batch: Batch, first: bool, last: bool) -> dict[str, Tensor]:
        if self._statistics is not None and first:
            self._statistics.keep()
        with nullcontext() if last else self._no_all_reduce():
            with autocast(self.device, self.amp):
                taught = None if self.teacher is None else self.teacher(batch.images)
                terms: dict[str, Tensor] = self.objective(
                    batch.images, batch.labels, self.sizes_at(self.step), batch.weights, taught
                )
            left_out = self.guard.check(terms, last)
            loss = terms["total"] / self.accumulate
            if self.scaler.is_enabled():
                # The scaler skips an update whose gradients are NaN; without one `found_inf` does.
                loss = loss * torch.where(left_out > 0, torch.nan, 1.0)
            else:
                self.optimizer.found_inf = left_out  # type: ignore[attr-defined]
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return terms

    def _optimize(self, step: int | Tensor) -> None:
        """Do the part of an update that a CUDA graph can record."""
        norm = self._clipped_norm()
        if norm is not None and not self.scaler.is_enabled():
            # float16's scaler looks at the gradients itself. All ranks have the same.
            self.optimizer.found_inf = self.guard.check_gradients(norm)  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.bases is not None:
            self.bases.update(self.sizes_at(self.step))
        if self._statistics is not None:
            self._statistics.put_back_if(self.guard.is_bad)
        self.guard.close(step)

    def _clipped_norm(self) -> Tensor | None:
        """Clip the gradients, if they are to be; return their norm before that, None if there are none."""
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            return nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        if self.scaler.is_enabled() or not parameters:
            return None
        # As torch.nn.utils.get_total_norm, but by few operations also where tensors are fake, to be counted.
        norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def _no_all_reduce(self) -> AbstractContextManager[None]:
        if isinstance(self.objective, DistributedDataParallel):
            return self.objective.no_sync()
        return nullcontext()


def raise_if_not_finite(trainer: Trainer) -> None:
    """Raise RunError if more consecutive updates had to be skipped than are allowed. Synchronises."""
    if (verdict := trainer.guard.verdict()) is None:
        return
    step, terms = verdict
    names = ", ".join(t for t in terms if t != "total")
    what = f"the loss is not finite at step {step}: {names or 'total'}"
    if terms == [*GRADIENTS]:
        what = f"a gradient is not finite at step {step}, although the loss is"
    raise RunError(
        f"{what}; the weights were not updated with it. Lower --lr, set --clip-grad, try --amp off, or "
        "--on-nonfinite skip 10"
    )


def require_trainable(config: ResolvedConfig, device: torch.device) -> None:
    """Raise UsageError for an option that the device, the processes or BatchNorm do not allow."""
    if config.batch_size < 2 and not config.evaluate:
        raise UsageError("--batch-size 1: BatchNorm needs at least 2 images to train on")
    if config.sync_bn and device.type != "cuda":
        raise UsageError("--sync-bn: PyTorch supports it on GPUs only")
    if config.fused_bn and device.type != "cuda":
        raise UsageError("--fused-bn: its kernels are for GPUs; leave it out")
    if config.fused_bn and importlib.util.find_spec("triton") is None:
        raise UsageError(
            "--fused-bn: torch came without Triton: pip install triton, or leave it out"
        )
    if config.cuda_graphs and device.type != "cuda":
        raise UsageError("--cuda-graphs: a CPU has none; leave it out")
    if config.cuda_graphs and distributed.is_distributed():
        raise UsageError("--cuda-graphs: supports a single process only; start without torchrun")


def _allow_compilations(sets: int) -> None:
    """Raise torch.compile's limit to this many combinations of sizes; by default all after the eighth run
    eagerly.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, sets + 8)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * (sets + 8))


def _objective(
    c: ResolvedConfig, model: ResolutionSwitchable, teacher: Teacher | None
) -> Objective:
    """Return network and losses, compiled with the teacher if --compile is given."""
    objective = Objective(
        model,
        c.kd_type if c.kd else None,
        c.label_smoothing,
        loss=c.loss,
        target_thresh=c.bce_target_thresh,
        teacher_weight=c.teacher_weight,
        temperature=c.teacher_temperature,
        teacher_loss=teacher.loss if teacher else "ce",
    )
    if c.compile:
        _allow_compilations(step_sets(c.phases, c.sizes_per_step))
        objective.compile(dynamic=False)  # sizes and the private BatchNorms are constants
        if teacher is not None:
            teacher.compile(dynamic=False)
    return objective


def _lr_schedule(c: ResolvedConfig, steps_per_epoch: int) -> LrSchedule:
    return LrSchedule(
        lr=c.lr,
        decay=c.lr_decay,
        steps=c.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=c.warmup * steps_per_epoch,
        gamma=c.gamma,
        step_epochs=c.step,
        milestones=c.schedule,
    )


def make_trainer(
    config: ResolvedConfig,
    model: ResolutionSwitchable,
    num_classes: int,
    steps_per_epoch: int,
    device: torch.device,
    say: Callable[[str], None] = lambda _: None,
    *,
    teacher: Teacher | None = None,
) -> Trainer:
    """Build the trainer that `config` describes; `model` and `teacher` must be on `device`. say: called
    with a message about what fails.
    """
    c = config
    phases = {phase.start * steps_per_epoch: phase.sizes for phase in c.phases}
    mix = None
    if c.mixup or c.cutmix:
        # Each rank draws for its own batches.
        seed = c.seed + (distributed.rank() << 32)
        mix = Mixup(c.mixup, c.cutmix, num_classes, seed, weighs_shares=not c.bce_target_thresh)
    return Trainer(
        distributed.wrap_ddp(
            _objective(c, model, teacher),
            device,
            all_used=c.has_all_sizes or model.shared_norm,
            # DDP does not support static_graph together with no_sync().
            static=c.accumulate == 1 and c.has_all_sizes,
            compress=c.grad_compress == "bf16",
        ),
        make_optimizer(
            model,
            c.opt,
            c.lr,
            c.momentum,
            c.weight_decay,
            norm_decay=c.decay == "all",
            layer_decay=c.layer_decay,
            norm_lr_mult=c.norm_lr_mult,
        ),
        _lr_schedule(c, steps_per_epoch),
        device,
        AMP_DTYPES[c.amp],
        accumulate=c.accumulate,
        clip_grad=c.clip_grad or None,
        sizes_at=SizeSampler(phases, c.sizes_per_step, c.seed).at,
        mix=mix,
        ema=ModelEma(model, c.ema) if c.ema else None,
        most_skipped=c.most_skipped,
        bases=BasisUpdater(model, model.sizes) if c.is_quantized else None,
        teacher=teacher,
        drop_path=DropPathSampler(
            model, c.batch_size, c.seed, distributed.rank(), distributed.world_size()
        ),
        cuda_graphs=c.cuda_graphs,
        say=say,
    )

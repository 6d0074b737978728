"""The losses of RS-Nets (Wang et al. 2020, sections 3.2 and 3.3): pure functions of logits and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ENSEMBLE = "ensemble"

KdType = Literal["ens_topdown", "ens"]


def ensemble_logits(logits: Sequence[Tensor] | Tensor, alpha: Tensor) -> Tensor:
    """Return the mean of the logits, S x (N, C) -> (N, C), weighted by the softmax of alpha, (S,).

    The logits are detached, so that only alpha learns from it (section 3.3, eq. 6).
    """
    weights = alpha.float().softmax(dim=0)
    return torch.einsum("s,snc->nc", weights, _stacked(logits).detach())


def distillation(
    logits: Sequence[Tensor] | Tensor,
    ensemble: Tensor,
    kd_type: KdType,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the sum of KL(teacher || student) over teacher-student pairs, each averaged over the batch.

    logits: S x (N, C), the largest size first. ensemble: (N, C). Teachers are detached, temperature 1.
    weights: (N,), the samples' in the average, of mean 1 over the training set; None: all 1.
    "ens": the ensemble teaches every size. "ens_topdown": every larger size teaches, too, and the sum
    over the S (S + 1) / 2 pairs is scaled by 2 / (S + 1), back to S terms.
    """
    students = F.log_softmax(_stacked(logits), dim=2)
    ensemble_teacher = F.log_softmax(ensemble.detach().float(), dim=1)
    teachers = torch.cat([ensemble_teacher[None], students.detach()])
    probabilities = teachers.exp()
    sums = []
    for j, student in enumerate(students.unbind()):
        # All of a student's teachers at once: a pair by itself would be eleven small GPU kernels.
        of_student = slice(0, j + 1) if kd_type == "ens_topdown" else slice(0, 1)
        divergence = probabilities[of_student] * (teachers[of_student] - student)
        sums.append((divergence if weights is None else divergence * weights[:, None]).sum())
    scale = 2 / (len(sums) + 1) if kd_type == "ens_topdown" else 1.0
    return scale / len(ensemble) * torch.stack(sums).sum()


def teacher_distillation(
    logits: Sequence[Tensor] | Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Return T^2 sum_j KL(softmax(t / T) || softmax(z_j / T)), each averaged over the batch.

    A frozen network's logits t teach all sizes alike, as it sees what they see: the same crop and the same
    mix (Beyer et al. 2022, "a good teacher is patient and consistent", section 3).

    logits: z, S x (N, C). teacher: t, (N, C), detached. temperature: T, whose square keeps the gradients'
    scale (Hinton et al. 2015, section 2). weights: as in `distillation`.
    """
    students = F.log_softmax(_stacked(logits) / temperature, dim=2)
    target = F.log_softmax(teacher.detach().float() / temperature, dim=1).expand_as(students)
    divergence = F.kl_div(students, target, reduction="none", log_target=True)
    if weights is not None:
        divergence = divergence * weights[:, None]
    return temperature**2 / len(teacher) * divergence.sum()


def loss_terms(
    logits: Sequence[Tensor],
    labels: Tensor,
    alpha: Tensor,
    sizes: Sequence[int],
    kd_type: KdType | None,
    label_smoothing: float = 0.0,
    *,
    weights: Tensor | None = None,
    teacher: Tensor | None = None,
    teacher_weight: float = 1.0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Return the named terms of the loss in float32, and "total", their sum.

    logits: S x (N, C), in the order of `sizes`, the largest first. alpha: (S,).
    labels: (N,) classes, or (N, C) shares of the classes. weights: (N,), the samples', or None.
    kd_type None leaves the distillation out; the ensemble's cross-entropy stays, for alpha's sake.
    teacher: (N, C), logits of a network that is not trained, whose `teacher_distillation` is added, times
    `teacher_weight`: one more teacher of each size, beside the labels, the ensemble and the larger sizes.
    """
    stacked = _stacked(logits)
    ensemble = ensemble_logits(stacked, alpha)
    outputs = torch.cat([stacked, ensemble[None]])
    losses = F.cross_entropy(
        outputs.flatten(0, 1),
        labels.expand(len(outputs), *labels.shape).flatten(0, 1),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    losses = losses.view(len(outputs), -1)
    means = (losses if weights is None else losses * weights).mean(dim=1)
    names = [*(f"ce/{size}" for size in sizes), "ce/ensemble"]
    terms = dict(zip(names, means.unbind(), strict=True))
    total = means.sum()
    if kd_type is not None:
        terms["kd"] = distillation(stacked, ensemble, kd_type, weights)
        total = total + terms["kd"]
    if teacher is not None:
        taught = teacher_distillation(stacked, teacher, temperature, weights)
        terms["kd/teacher"] = teacher_weight * taught
        total = total + terms["kd/teacher"]
    return terms | {"total": total}


def _stacked(logits: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the logits as one tensor, (S, N, C) float32."""
    return (logits if isinstance(logits, Tensor) else torch.stack(list(logits))).float()

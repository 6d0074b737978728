"""The losses of RS-Nets (Wang et al. 2020, sections 3.2 and 3.3): pure functions of logits and labels.

With softmax and cross-entropy as in the paper, or with a sigmoid and binary cross-entropy of every class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ENSEMBLE = "ensemble"

KdType = Literal["ens_topdown", "ens"]
LossName = Literal["ce", "bce"]


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
    loss: LossName = "ce",
) -> Tensor:
    """Return the sum of KL(teacher || student) over teacher-student pairs, each averaged over the batch.

    logits: S x (N, C), the largest size first. ensemble: (N, C). Teachers are detached, temperature 1.
    weights: (N,), sample weights, with mean 1 over the training set; None: all 1.
    "ens": the ensemble teaches every size. "ens_topdown": every larger size teaches, too, and the sum
    over the S (S + 1) / 2 pairs is scaled by 2 / (S + 1), back to S terms.

    loss "bce": the pair's divergence is that of C yes-or-no distributions, p = sigmoid(t) and sigmoid(z):
        1/C sum_c p (log p - log sigmoid(z)) + (1 - p) (log(1 - p) - log(1 - sigmoid(z)))
    With log sigmoid(x) = x - softplus(x) and log(1 - sigmoid(x)) = -softplus(x) it becomes
        1/C sum_c softplus(z) - softplus(t) + p (t - z),  of gradient (sigmoid(z) - sigmoid(t)) / C.
    It is the binary cross-entropy with the teacher's probabilities as targets, minus its minimum, just as
    KL is cross-entropy minus its minimum. 1/C, the mean over the classes, puts it on the scale of the
    labels' loss.
    """
    students, ensemble = _stacked(logits), ensemble.detach().float()
    if loss == "ce":  # then both are log-probabilities from here on, else logits
        students, ensemble = F.log_softmax(students, dim=2), F.log_softmax(ensemble, dim=1)
    # (1 + S, N, C), the ensemble first, so that teachers[: j + 1] are the ensemble and the j larger sizes.
    teachers = torch.cat([ensemble[None], students.detach()])
    probabilities = teachers.exp() if loss == "ce" else teachers.sigmoid()
    top_down = kd_type == "ens_topdown"
    sums = []
    for j, student in enumerate(students.unbind()):
        # All teachers of a student at once: pair by pair, each would take eleven small GPU kernels.
        own = slice(j + 1 if top_down else 1)
        divergence = probabilities[own] * (teachers[own] - student)
        if loss == "bce":
            surplus = F.softplus(student) - F.softplus(teachers[own])
            divergence = (divergence + surplus) / student.shape[1]
        sums.append((divergence if weights is None else divergence * weights[:, None]).sum())
    scale = 2 / (len(sums) + 1) if top_down else 1.0
    return scale / len(ensemble) * torch.stack(sums).sum()


def teacher_distillation(
    logits: Sequence[Tensor] | Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    loss: LossName = "ce",
    teacher_loss: LossName = "ce",
) -> Tensor:
    """Return T^2 sum_j KL(softmax(t / T) || softmax(z_j / T)), each averaged over the batch.

    The logits t of a frozen network teach every size. It sees the same crop and the same mixed samples as
    they do (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent", section
    3).

    logits: z, S x (N, C). teacher: t, (N, C), detached. temperature: T, whose square keeps the gradients'
    scale (Hinton et al. 2015, section 2). weights: as in `distillation`.

    loss "bce": the students answer C questions, whether class c is in the image, and the teacher answers each
    with a probability q_c, as soft labels of the binary cross-entropy (for several labels so in Yang et al.
    2023, "Multi-label knowledge distillation", section 3.2). Less what that is at best, it is
        T^2 sum_j 1/C sum_c KL(q_c || sigmoid(z_jc / T)),  of gradient T (sigmoid(z_jc / T) - q_c) / C.
    teacher_loss: the loss that the teacher was trained with; it determines q. "bce": sigmoid(t / T), as the
    sizes teach each other in `distillation`. "ce": softmax(t / T), the teacher's probability of that class;
    its sigmoids would not be probabilities, because a softmax determines logits only up to a constant per
    image. With many classes a large T drives every q_c towards 1/C, which says "absent", whereas sigmoids
    go to 1/2, "undecided".
    """
    students, target = _stacked(logits) / temperature, teacher.detach().float() / temperature
    if loss == "bce":
        q = target.sigmoid() if teacher_loss == "bce" else target.softmax(dim=1)
        least = torch.special.entr(q) + torch.special.entr(1 - q)
        divergence = F.binary_cross_entropy_with_logits(
            students, q.expand_as(students), reduction="none"
        )
        divergence = (divergence - least) / students.shape[2]
    else:
        students = F.log_softmax(students, dim=2)
        target = F.log_softmax(target, dim=1).expand_as(students)
        divergence = F.kl_div(students, target, reduction="none", log_target=True)
    if weights is not None:
        divergence = divergence * weights[:, None]
    return temperature**2 / len(teacher) * divergence.sum()


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, target_thresh: float = 0.0
) -> Tensor:
    """Return the binary cross-entropy of (S, N, C) logits, averaged over the classes: (S, N).

    As timm's BinaryCrossEntropy (Wightman et al. 2021, "ResNet strikes back", section 2.2), except that
    mixed labels are smoothed as well, as timm's mixup does.

    labels: (N,) classes, or (N, C) shares of the classes. target_thresh: targets above it become 1 and all
    others 0, so that each class of a mixed image counts fully; 0 keeps the targets as they are.
    """
    classes = logits.shape[-1]
    if labels.ndim == 1:
        target = torch.zeros_like(logits[0]).scatter_(1, labels[:, None], 1.0)
    else:
        target = labels.to(logits.dtype)
    target = target * (1 - label_smoothing) + label_smoothing / classes
    if target_thresh:
        target = target.gt(target_thresh).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none")
    return losses.mean(dim=2)


def loss_terms(
    logits: Sequence[Tensor],
    labels: Tensor,
    alpha: Tensor,
    sizes: Sequence[int],
    kd_type: KdType | None,
    label_smoothing: float = 0.0,
    *,
    loss: LossName = "ce",
    target_thresh: float = 0.0,
    weights: Tensor | None = None,
    teacher: Tensor | None = None,
    teacher_weight: float = 1.0,
    temperature: float = 1.0,
    teacher_loss: LossName = "ce",
) -> dict[str, Tensor]:
    """Return the named terms of the loss in float32, and "total", their sum.

    logits: S x (N, C), in the order of `sizes`, the largest first. alpha: (S,).
    labels: (N,) classes, or (N, C) shares of the classes. weights: (N,), the samples', or None.
    kd_type None: no distillation; the ensemble's cross-entropy stays, because it alone trains alpha.
    loss "bce": `binary_cross_entropy`, which has target_thresh; its terms are bce/SIZE, not ce/SIZE.
    teacher: (N, C), logits of a frozen network; adds `teacher_weight` times `teacher_distillation`, on top
    of labels, ensemble and larger sizes. teacher_loss: the loss that it was trained with.
    """
    stacked = _stacked(logits)
    ensemble = ensemble_logits(stacked, alpha)
    outputs = torch.cat([stacked, ensemble[None]])
    if loss == "bce":
        losses = binary_cross_entropy(outputs, labels, label_smoothing, target_thresh)
    else:
        losses = F.cross_entropy(
            outputs.flatten(0, 1),
            labels.expand(len(outputs), *labels.shape).flatten(0, 1),
            reduction="none",
            label_smoothing=label_smoothing,
        ).view(len(outputs), -1)
    means = (losses if weights is None else losses * weights).mean(dim=1)
    names = [f"{loss}/{output}" for output in (*sizes, ENSEMBLE)]
    terms = dict(zip(names, means.unbind(), strict=True))
    total = means.sum()
    if kd_type is not None:
        terms["kd"] = distillation(stacked, ensemble, kd_type, weights, loss)
        total = total + terms["kd"]
    if teacher is not None:
        taught = teacher_distillation(stacked, teacher, temperature, weights, loss, teacher_loss)
        terms["kd/teacher"] = teacher_weight * taught
        total = total + terms["kd/teacher"]
    return terms | {"total": total}


def _stacked(logits: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the logits as one tensor, (S, N, C) float32."""
    return (logits if isinstance(logits, Tensor) else torch.stack(list(logits))).float()

"""The losses of RS-Nets (Wang et al. 2020, sections 3.2 and 3.3): pure functions of logits and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

KdType = Literal["ens_topdown", "ens"]


def ensemble_logits(logits: Sequence[Tensor], alpha: Tensor) -> Tensor:
    """S x (N, C), (S,) -> (N, C): the logits' mean, weighted by softmax(alpha).

    The logits are detached, so that only alpha learns from it (section 3.3, eq. 6).
    """
    weights = alpha.float().softmax(dim=0)
    return torch.einsum("s,snc->nc", weights, torch.stack([z.detach().float() for z in logits]))


def distillation(logits: Sequence[Tensor], ensemble: Tensor, kd_type: KdType) -> Tensor:
    """The sum of KL(teacher || student) over teacher-student pairs, each averaged over the batch.

    logits: S x (N, C), the largest size first. ensemble: (N, C). Teachers are detached, temperature 1.
    "ens": the ensemble teaches every size. "ens_topdown": every larger size teaches, too, and the sum
    over the S (S + 1) / 2 pairs is scaled by 2 / (S + 1), back to S terms.
    """
    log_students = [F.log_softmax(z.float(), dim=1) for z in logits]
    log_teachers = [F.log_softmax(ensemble.detach().float(), dim=1)]
    terms = []
    for log_q in log_students:
        for log_p in log_teachers:
            terms.append(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))
        if kd_type == "ens_topdown":
            log_teachers.append(log_q.detach())
    scale = 2 / (len(logits) + 1) if kd_type == "ens_topdown" else 1.0
    return scale * torch.stack(terms).sum()


def loss_terms(
    logits: Sequence[Tensor],
    labels: Tensor,
    alpha: Tensor,
    sizes: Sequence[int],
    kd_type: KdType | None,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """The named terms of the loss in float32, and "total", their sum.

    logits: S x (N, C), in the order of `sizes`, the largest first. alpha: (S,).
    labels: (N,) classes, or (N, C) shares of the classes.
    kd_type None leaves the distillation out; the ensemble's cross-entropy stays, for alpha's sake.
    """
    ensemble = ensemble_logits(logits, alpha)
    terms = {
        f"ce/{size}": F.cross_entropy(z.float(), labels, label_smoothing=label_smoothing)
        for size, z in zip(sizes, logits, strict=True)
    }
    terms["ce/ensemble"] = F.cross_entropy(ensemble, labels, label_smoothing=label_smoothing)
    if kd_type is not None:
        terms["kd"] = distillation(logits, ensemble, kd_type)
    return terms | {"total": torch.stack(list(terms.values())).sum()}

"""The losses against the original's numbers and a plain reimplementation."""

from __future__ import annotations

import math

import pytest
import torch

from rsnet.losses import distillation, ensemble_logits, loss_terms, teacher_distillation
from tests.helpers import parity

CASES = sorted(parity.numbers("loss"))


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_originals(case):
    sizes, kd_type = case.split("/")
    s = int(sizes)
    expected = parity.numbers("loss")[case]
    logits = [(3 * parity.wave((6, 11), 10 + i)).float().requires_grad_() for i in range(s)]
    alpha = (1 + 0.5 * parity.wave((s,), 20)).float().requires_grad_()
    labels = torch.tensor([0, 5, 10, 2, 7, 5])
    kd = None if kd_type == "None" else kd_type
    terms = loss_terms(logits, labels, alpha, range(s), kd)
    terms["total"].backward()
    assert terms["total"].item() == pytest.approx(expected["loss"], abs=2e-5)
    assert alpha.grad.tolist() == pytest.approx(expected["grad_alpha"], abs=2e-6)
    norms = [z.grad.norm().item() for z in logits]
    assert norms == pytest.approx(expected["grad_norm_logits"], abs=2e-6)


def test_total_is_the_sum_of_the_named_terms():
    logits = [torch.randn(4, 7) for _ in range(3)]
    terms = loss_terms(logits, torch.arange(4), torch.ones(3), (64, 48, 32), "ens_topdown")
    total = terms.pop("total")
    assert list(terms) == ["ce/64", "ce/48", "ce/32", "ce/ensemble", "kd"]
    assert total.item() == pytest.approx(sum(t.item() for t in terms.values()))


def test_topdown_distillation_is_the_pairwise_sum():
    logits = [torch.randn(3, 5) for _ in range(4)]
    ensemble = torch.randn(3, 5)

    def kl(teacher, student):
        rows = []
        for t, z in zip(teacher.tolist(), student.tolist(), strict=True):
            p = [math.exp(v) / sum(map(math.exp, t)) for v in t]
            q = [math.exp(v) / sum(map(math.exp, z)) for v in z]
            rows.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        return sum(rows) / len(rows)

    pairs = [(ensemble, z) for z in logits]
    pairs += [(logits[k], logits[j]) for j in range(4) for k in range(j)]
    expected = 2 / 5 * sum(kl(t, z) for t, z in pairs)
    assert distillation(logits, ensemble, "ens_topdown").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_teachers_term_is_the_formula_in_double_precision(weighted):
    """w T^2 sum_j KL(softmax(t / T) || softmax(z_j / T)), beside all other terms; t is not trained."""
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(4, 5, generator=generator).requires_grad_() for _ in range(3)]
    teacher = (3 * torch.randn(4, 5, generator=generator)).requires_grad_()
    weights = torch.tensor([0.5, 1.5, 0.0, 2.0]) if weighted else None
    labels = torch.tensor([0, 1, 2, 4])
    expected = 0.0
    for z in logits:
        for n in range(4):
            t, s = ([math.exp(v / 3) for v in row[n].tolist()] for row in (teacher, z))
            p, q = [v / sum(t) for v in t], [v / sum(s) for v in s]
            share = 1.0 if weights is None else weights[n].item()
            expected += share * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 4
    arguments = logits, labels, torch.ones(3), (32, 24, 16), "ens_topdown", 0.1
    plain = loss_terms(*arguments, weights=weights)
    found = loss_terms(
        *arguments, weights=weights, teacher=teacher, teacher_weight=0.7, temperature=3.0
    )
    assert list(found) == [*list(plain)[:-1], "kd/teacher", "total"]
    assert found["kd/teacher"].item() == pytest.approx(0.7 * 9 * expected, rel=1e-5)
    assert found["total"].item() == pytest.approx(plain["total"].item() + 6.3 * expected, rel=1e-6)
    assert all(torch.equal(found[name], plain[name]) for name in plain if name != "total")
    found["kd/teacher"].backward()
    assert teacher.grad is None


@pytest.mark.parametrize("teacher_loss", ["ce", "bce"])
def test_a_teacher_answers_the_questions_of_sigmoids_with_its_own_probabilities(teacher_loss):
    """Divergences of two-outcome distributions, written out; a bce teacher's are of sigmoids, too."""
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(4, 5, generator=generator).requires_grad_() for _ in range(3)]
    teacher = (3 * torch.randn(4, 5, generator=generator)).requires_grad_()
    weights = torch.tensor([0.5, 1.5, 0.0, 2.0])
    expected, slopes = 0.0, []
    for z in logits:
        for n in range(4):
            t = [v / 3 for v in teacher[n].tolist()]
            odds = [math.exp(v) for v in t]
            q = [o / (1 + o) if teacher_loss == "bce" else o / sum(odds) for o in odds]
            p = [1 / (1 + math.exp(-v / 3)) for v in z[n].tolist()]
            share = weights[n].item() / 4
            expected += share / 5 * sum(
                a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in zip(q, p, strict=True)
            )  # fmt: skip
            slopes += [0.7 * share * 3 * (b - a) / 5 for a, b in zip(q, p, strict=True)]
    found = loss_terms(
        logits, torch.tensor([0, 1, 2, 4]), torch.ones(3), (32, 24, 16), "ens_topdown", loss="bce",
        weights=weights, teacher=teacher, teacher_weight=0.7, temperature=3.0, teacher_loss=teacher_loss,
    )  # fmt: skip
    assert found["kd/teacher"].item() == pytest.approx(0.7 * 9 * expected, rel=1e-5)
    gradients = torch.autograd.grad(found["kd/teacher"], logits)
    assert torch.cat(gradients).flatten().tolist() == pytest.approx(slopes, rel=1e-4, abs=1e-7)
    total = sum(term for name, term in found.items() if name != "total")
    torch.testing.assert_close(found["total"], total)


@pytest.mark.parametrize("teacher_loss", ["ce", "bce"])
def test_a_teacher_that_is_certain_has_a_finite_divergence(teacher_loss):
    teacher, student = torch.tensor([[300.0, -300, 0]]), torch.zeros(1, 3, requires_grad=True)
    loss = teacher_distillation([student], teacher, loss="bce", teacher_loss=teacher_loss)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_only_alpha_learns_from_the_ensemble():
    logits = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    alpha = torch.zeros(2, requires_grad=True)
    ensemble_logits(logits, alpha)[0, 0].backward()
    assert all(z.grad is None for z in logits)
    assert alpha.grad.abs().sum() > 0


def test_teachers_get_no_gradient():
    large, small = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    distillation([large.detach(), small], large, "ens_topdown").backward()
    assert large.grad is None


def test_label_smoothing_is_pytorchs():
    logits, labels = torch.randn(4, 6), torch.arange(4)
    terms = loss_terms([logits], labels, torch.ones(1), (32,), None, label_smoothing=0.1)
    expected = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
    torch.testing.assert_close(terms["ce/32"], expected)


def test_half_precision_logits_give_a_float32_loss():
    logits = [torch.randn(2, 3, dtype=torch.bfloat16) for _ in range(2)]
    terms = loss_terms(logits, torch.tensor([0, 1]), torch.ones(2), (32, 16), "ens")
    assert {t.dtype for t in terms.values()} == {torch.float32}


def test_weights_of_samples_weigh_every_term():
    """By hand: the mean of weight times loss; with weights 0 and 2, twice the half of the batch."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, 5, generator=generator) for _ in range(3)]
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    alpha = torch.randn(3, generator=generator)
    weights = torch.tensor([2.0, 0, 2, 0, 0, 2])
    kept = weights > 0
    for kd_type in ("ens_topdown", "ens", None):
        found = loss_terms(logits, labels, alpha, (3, 2, 1), kd_type, 0.1, weights=weights)
        half = loss_terms([x[kept] for x in logits], labels[kept], alpha, (3, 2, 1), kd_type, 0.1)
        for name, value in half.items():
            torch.testing.assert_close(found[name], value)
        ones = loss_terms(logits, labels, alpha, (3, 2, 1), kd_type, weights=torch.ones(6))
        plain = loss_terms(logits, labels, alpha, (3, 2, 1), kd_type)
        assert all(torch.equal(ones[name], plain[name]) for name in plain)


def _written_out(logits, shares, alpha, kd_type, smoothing, thresh, weights):
    """The sigmoid losses in float64, with probabilities and their logarithms."""
    n, classes = shares.shape
    targets = shares * (1 - smoothing) + smoothing / classes
    if thresh:
        targets = (targets > thresh).double()

    def cross(p, z):
        q = 1 / (1 + (-z).exp())
        rows = -(p * q.log() + (1 - p) * (1 - q).log()).mean(1)
        return (rows * weights).sum() / n

    ensemble = sum(a * z.detach() for a, z in zip(alpha.softmax(0), logits, strict=True))
    total = sum(cross(targets, z) for z in [*logits, ensemble])
    for j, student in enumerate(logits):
        larger = logits[:j] if kd_type == "ens_topdown" else []
        for teacher in [ensemble, *larger] if kd_type else []:
            p = 1 / (1 + (-teacher.detach()).exp())
            scale = 2 / (len(logits) + 1) if kd_type == "ens_topdown" else 1
            total = total + scale * (cross(p, student) - cross(p, teacher.detach()))
    return total


@pytest.mark.parametrize("kd_type", ["ens_topdown", "ens", None])
@pytest.mark.parametrize(("smoothing", "thresh"), [(0.1, 0.0), (0.0, 0.2)])
def test_binary_losses_and_their_gradients_are_the_sigmoids_written_out(kd_type, smoothing, thresh):
    generator = torch.Generator().manual_seed(0)
    logits = [(3 * torch.randn(6, 7, generator=generator)).requires_grad_() for _ in range(3)]
    alpha = torch.randn(3, generator=generator).requires_grad_()
    shares = torch.rand(6, 7, generator=generator).softmax(1)
    weights = torch.rand(6, generator=generator)
    found = loss_terms(
        logits, shares, alpha, (3, 2, 1), kd_type, smoothing,
        loss="bce", target_thresh=thresh, weights=weights,
    )  # fmt: skip
    exact = [x.detach().double().requires_grad_() for x in [*logits, alpha]]
    expected = _written_out(
        exact[:3], shares.double(), exact[3], kd_type, smoothing, thresh, weights.double()
    )
    assert found["total"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert list(found)[:4] == ["bce/3", "bce/2", "bce/1", "bce/ensemble"]
    gradients = torch.autograd.grad(found["total"], [*logits, alpha])
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("smoothing", "thresh"), [(0.1, 0.0), (0.0, 0.0), (0.0, 0.2)])
def test_binary_cross_entropy_is_timms(mixed, smoothing, thresh):
    mixup_target = pytest.importorskip("timm.data.mixup").mixup_target
    criterion = pytest.importorskip("timm.loss").BinaryCrossEntropy(smoothing, thresh or None)
    logits, labels = torch.randn(4, 6), torch.tensor([5, 0, 1, 1])
    ours = theirs = labels
    if mixed:  # as timm's mixup makes them, which smooths by itself
        theirs = mixup_target(labels, 6, 0.7, smoothing)
        ours = mixup_target(labels, 6, 0.7, 0.0)
    options = {"label_smoothing": smoothing, "loss": "bce", "target_thresh": thresh}
    terms = loss_terms([logits], ours, torch.ones(1), (32,), None, **options)
    torch.testing.assert_close(terms["bce/32"], criterion(logits, theirs))


def test_a_sigmoid_that_equals_its_teachers_has_no_divergence_however_large_it_is():
    large = torch.tensor([[80.0, -80, 0], [-300, 300, 1e4]])
    student = large.clone().requires_grad_()
    loss = distillation([student], large, "ens", loss="bce")
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()

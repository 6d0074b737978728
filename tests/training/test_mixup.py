"""Mixup and CutMix at several sizes, against the papers' formulas written out."""

from __future__ import annotations

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional as F

from pipelines.batch import Batch
from rsnet.losses import loss_terms
from rsnet.training.mixup import Mixup
from tests.helpers.operations import Operations

SIZES = (40, 20, 10)
N, CLASSES = 6, 4


def _flat_batch() -> Batch:
    """Every image is of one colour, its sample's number, so that shares can be read off."""
    number = torch.arange(N, dtype=torch.float32)[:, None, None, None]
    images = tuple(
        number.expand(N, 3, s, s).contiguous(memory_format=torch.channels_last) for s in SIZES
    )
    return Batch(images, torch.tensor([0, 1, 2, 3, 0, 1]))


def _shares(mixed: Batch) -> list[float]:
    """How much of sample 1 (value 1, neighbour 0) is left, at each size."""
    return [x[1].mean().item() for x in mixed.images]


def test_mixup_has_one_share_and_one_partner_at_all_sizes():
    batch = _flat_batch()
    for index in range(5):
        mixed = Mixup(0.2, 0, CLASSES, seed=1)(batch, index)
        share = mixed.labels[1, 1].item()
        for x, plain in zip(mixed.images, batch.images, strict=True):
            expected = share * plain + (1 - share) * plain[[5, 0, 1, 2, 3, 4]]
            torch.testing.assert_close(x, expected)
        one_hot = torch.eye(CLASSES)[batch.labels]
        torch.testing.assert_close(
            mixed.labels, share * one_hot + (1 - share) * one_hot[[5, 0, 1, 2, 3, 4]]
        )


def test_smoothed_mixed_labels_have_timms_loss():
    labels, logits = torch.tensor([2, 0]), torch.randn(2, CLASSES)
    images = (torch.zeros(2, 3, 4, 4),)
    for index in range(4):
        mixed = Mixup(0.2, 1.0, CLASSES, seed=1)(Batch(images, labels), index)
        share = mixed.labels[0, 2].item()
        # Of two samples, timm's partner, from the other end of the batch, is the neighbour.
        theirs = SoftTargetCrossEntropy()(logits, mixup_target(labels, CLASSES, share, 0.1))
        terms = loss_terms([logits], mixed.labels, torch.ones(1), [4], None, 0.1)
        torch.testing.assert_close(terms["ce/4"], theirs)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0)])
def test_a_mixed_samples_loss_is_both_weighted_losses_by_their_shares(mixup, cutmix):
    weights, logits = torch.tensor([0.1, 1.9, 0.1, 0.1, 1.9, 0.5]), torch.randn(6, CLASSES)
    batch = _flat_batch()
    mixed = Mixup(mixup, cutmix, CLASSES, seed=1)(batch._replace(weights=weights), 0)
    # What is mixed does not depend on the weights.
    share = Mixup(mixup, cutmix, CLASSES, seed=1)(batch, 0).labels[1, 1]
    partners = [5, 0, 1, 2, 3, 4]
    own = weights * F.cross_entropy(logits, batch.labels, reduction="none")
    theirs = F.cross_entropy(logits, batch.labels[partners], reduction="none")
    expected = share * own + (1 - share) * weights[partners] * theirs
    torch.testing.assert_close(
        mixed.weights * F.cross_entropy(logits, mixed.labels, reduction="none"), expected
    )
    terms = loss_terms([logits], mixed.labels, torch.ones(1), [4], None, weights=mixed.weights)
    torch.testing.assert_close(terms["ce/4"], expected.mean())


def test_shares_that_a_threshold_decides_about_are_not_weighted():
    weights = torch.tensor([0.1, 1.9, 0.1, 0.1, 1.9, 0.5])
    mixer = Mixup(0.4, 0, CLASSES, seed=1, weighs_shares=False)
    mixed, plain = mixer(_flat_batch()._replace(weights=weights), 0), mixer(_flat_batch(), 0)
    torch.testing.assert_close(mixed.labels, plain.labels)
    share = plain.labels[1, 1]
    torch.testing.assert_close(
        mixed.weights, share * weights + (1 - share) * weights[[5, 0, 1, 2, 3, 4]]
    )


def test_cutmix_pastes_the_same_box_at_all_sizes():
    batch = _flat_batch()
    seen = set()
    for index in range(20):
        mixed = Mixup(0, 1.0, CLASSES, seed=1)(batch, index)
        large, *smaller = (x[1, 0] for x in mixed.images)
        rows, columns = (large == 0).any(1).nonzero(), (large == 0).any(0).nonzero()
        seen.add(len(rows))
        for x in smaller:
            factor = SIZES[0] / x.shape[-1]
            for pasted, axis in ((rows, 1), (columns, 0)):
                there = (x == 0).any(axis).nonzero()
                if len(there):
                    assert there.min().item() * factor == pytest.approx(
                        pasted.min().item(), abs=factor
                    )
                    assert (there.max().item() + 1) * factor == pytest.approx(
                        pasted.max().item() + 1, abs=factor
                    )
    assert len(seen) > 5


def test_cutmix_labels_have_the_shares_of_the_areas():
    batch = _flat_batch()
    for index in range(20):
        mixed = Mixup(0, 1.0, CLASSES, seed=1)(batch, index)
        # A pixel at each edge may be off: 2 / 40 of a side.
        assert mixed.labels[1, 1].item() == pytest.approx(_shares(mixed)[0], abs=0.1)
        assert mixed.labels.sum(1) == pytest.approx(torch.ones(N))


def test_the_batch_itself_is_not_changed():
    batch = _flat_batch()
    Mixup(0.2, 1.0, CLASSES, seed=0)(batch, 0)
    assert all(torch.equal(a, b) for a, b in zip(batch.images, _flat_batch().images, strict=True))


def test_the_layout_and_the_dtype_stay():
    batch = _flat_batch()
    batch = Batch(tuple(x.bfloat16() for x in batch.images), batch.labels)
    for mixer in (Mixup(0.2, 0, CLASSES, 0), Mixup(0, 1.0, CLASSES, 0)):
        for x in mixer(batch, 0).images:
            assert x.dtype == torch.bfloat16
            assert x.is_contiguous(memory_format=torch.channels_last)


def test_no_image_is_rolled():
    """On a GPU `roll` copies what is channels-last into contiguous memory first (torch 2.11 to 2.15)."""
    batch = _flat_batch()
    with Operations() as operations:
        for mixer in (Mixup(0.2, 0, CLASSES, 0), Mixup(0, 1.0, CLASSES, 0)):
            mixer(batch, 0)
    assert operations.count["lerp"]
    assert not operations.count["roll"]


def test_draws_depend_on_seed_and_batch_alone():
    batch = _flat_batch()

    def drawn(seed: int, index: int) -> float:
        return Mixup(0.4, 1.0, CLASSES, seed)(batch, index).labels[1, 1].item()

    assert drawn(3, 7) == drawn(3, 7)
    assert len({drawn(seed, index) for seed in range(4) for index in range(4)}) == 16


def test_both_kinds_are_drawn_if_both_are_asked_for():
    kinds = {
        bool((Mixup(0.4, 1.0, CLASSES, 0)(_flat_batch(), i).images[0][1] % 1).any())
        for i in range(12)
    }
    assert kinds == {True, False}  # mixup makes fractions, CutMix none

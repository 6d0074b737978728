"""State dicts of switchable networks: some of the sizes, one size more."""

from __future__ import annotations

import copy

import pytest
import torch

from pipelines.utils.errors import DataError
from rsnet.models.resnet import scaled_resnet
from rsnet.models.state_dict import add_size, neighbour_shares, select_sizes, take_sizes
from rsnet.models.switchable import ResolutionSwitchable

SIZES = (48, 40, 24)


def _model(sizes=SIZES, shared_norm=False) -> ResolutionSwitchable:
    return ResolutionSwitchable(scaled_resnet("resnet10", 3, 0.125), sizes, shared_norm).eval()


@pytest.fixture
def trained() -> ResolutionSwitchable:
    """A network whose BatchNorms and alphas differ, as after training."""
    model = _model()
    for layer in model._norms:
        for norm in layer.by_resolution:
            torch.nn.init.normal_(norm.weight, 1, 0.2)
            torch.nn.init.normal_(norm.bias, 0, 0.2)
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
    torch.nn.init.normal_(model.alpha)
    return model


def test_a_subset_of_the_sizes_takes_their_batchnorm_along(trained):
    part = _model((24, 48))
    part.load_state_dict(select_sizes(trained.state_dict(), SIZES, part.sizes))
    x = torch.randn(1, 3, 32, 32)
    for size in part.sizes:
        assert torch.equal(part(x, size), trained(x, size))
    assert part.alpha.tolist() == trained.alpha[[0, 2]].tolist()


def test_a_subset_of_the_sizes_keeps_a_shared_batchnorm():
    whole, part = _model(shared_norm=True), _model((40,), shared_norm=True)
    part.load_state_dict(select_sizes(whole.state_dict(), SIZES, (40,), shared_norm=True))
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(part(x), whole(x))


def test_added_sizes_alone_have_equal_shares_in_the_ensemble(trained):
    state = add_size(trained.state_dict(), SIZES, 32, {40: 1.0})
    assert select_sizes(state, (48, 40, 32, 24), (32,))["alpha"].tolist() == [1.0]


def test_a_size_that_was_not_trained_cannot_be_selected(trained):
    with pytest.raises(ValueError, match=r"\[36\] are not among the trained \[48, 40, 24\]"):
        select_sizes(trained.state_dict(), SIZES, (48, 36))


def test_neighbours_share_by_distance():
    assert neighbour_shares((224, 192, 160), 176) == {192: 0.5, 160: 0.5}
    assert neighbour_shares((224, 160), 176) == {224: 0.25, 160: 0.75}
    assert neighbour_shares((224, 160), 256) == {224: 1.0}
    assert neighbour_shares((224, 160), 96) == {160: 1.0}


def test_the_new_batchnorm_is_the_neighbours_mean(trained):
    extended = _model((48, 40, 36, 24))
    extended.load_state_dict(add_size(trained.state_dict(), SIZES, 36, neighbour_shares(SIZES, 36)))
    for before, after in zip(trained._norms, extended._norms, strict=True):
        for name in ("weight", "bias", "running_mean", "running_var"):
            at_40, at_24 = (getattr(before.by_resolution[i], name) for i in (1, 2))
            expected = 0.75 * at_40 + 0.25 * at_24
            torch.testing.assert_close(getattr(after.by_resolution[2], name), expected)


@pytest.mark.parametrize("size", [64, 44, 32, 16])
def test_other_sizes_and_the_ensemble_stay_bit_equal(trained, size):
    before = copy.deepcopy(trained.state_dict())
    extended = _model((*SIZES, size))
    extended.load_state_dict(add_size(before, SIZES, size, neighbour_shares(SIZES, size)))
    for s in SIZES:
        x = torch.randn(2, 3, s, s)
        assert torch.equal(extended(x), trained(x))
    weights = dict(zip(extended.sizes, extended.ensemble_weights().tolist(), strict=True))
    assert weights.pop(size) == 0
    assert list(weights.values()) == trained.ensemble_weights().tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("alpha"), "it has no alpha, for 2 sizes"),
        (lambda s: s.update(alpha=torch.ones(5)), r"it has an alpha of shape \(5,\), for 2 sizes"),
        (lambda s: s.update(alpha=torch.ones(())), r"it has an alpha of shape \(\), for 2 sizes"),
        (
            lambda s: s.update({"bn.by_resolution.2.weight": torch.ones(1)}),
            "it has BatchNorm of 3 sizes, not 2",
        ),
    ],
)
def test_a_state_of_other_sizes_than_are_said_is_refused(change, message):
    """Else the BatchNorm of some would be left out, and that of others taken for theirs."""
    state = {f"bn.by_resolution.{i}.weight": torch.ones(1) for i in range(2)}
    state |= {"alpha": torch.ones(2)}
    assert take_sizes(state, [32, 24], [24])[1] == {24: 24}
    change(state)
    with pytest.raises(DataError, match=message):
        take_sizes(state, [32, 24], [24])

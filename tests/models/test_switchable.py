"""Private BatchNorm per resolution, everything else shared."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rsnet.models.resnet import scaled_resnet
from rsnet.models.switchable import ResolutionSwitchable, SwitchableBatchNorm2d, make_switchable

SIZES = (48, 40, 32)


def _network() -> nn.Module:
    return scaled_resnet("resnet10", num_classes=5, width_mult=0.125)


def _norm(x, norm, training=False):
    return nn.functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, 0.0, norm.eps
    )


def _randomised(model: nn.Module) -> nn.Module:
    """BatchNorm layers that differ, so that taking the wrong one shows."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def model() -> ResolutionSwitchable:
    network = _network()
    return _randomised(ResolutionSwitchable(network, SIZES)).eval()


def test_the_selected_batchnorm_is_applied():
    layer = _randomised(SwitchableBatchNorm2d(nn.BatchNorm2d(4), 3)).eval()
    x = torch.randn(2, 4, 5, 5)
    for i in range(3):
        layer.active = i
        torch.testing.assert_close(layer(x), _norm(x, layer.by_resolution[i]))


def test_only_batchnorm_becomes_private():
    plain = _network()
    others = {
        n: p for n, p in plain.named_parameters() if "bn" not in n and "downsample.1" not in n
    }
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    model = make_switchable(plain, 3)
    assert model is plain
    for name, parameter in others.items():
        assert model.get_parameter(name) is parameter
    layers = [m for m in model.modules() if isinstance(m, SwitchableBatchNorm2d)]
    assert len(layers) == norms == 12
    assert all(len(layer.by_resolution) == 3 for layer in layers)


def test_a_new_network_starts_as_the_plain_one():
    plain = _network().eval()
    x = torch.randn(2, 3, 40, 40)
    expected = plain(x)
    model = ResolutionSwitchable(plain, SIZES).eval()
    for size in SIZES:
        torch.testing.assert_close(model(x, size), expected)


def test_each_resolution_updates_only_its_own_batchnorm(model):
    before = copy.deepcopy(model.state_dict())
    model.train()
    model(torch.randn(2, 3, 40, 40), size=40).sum().backward()
    for name, value in model.state_dict().items():
        changed = not torch.equal(value, before[name])
        is_statistic = "running" in name or "num_batches" in name
        assert changed == (is_statistic and ".by_resolution.1." in name), name
    for name, parameter in model.named_parameters():
        private_to_others = ".by_resolution.0." in name or ".by_resolution.2." in name
        assert (parameter.grad is None) == (private_to_others or name == "alpha"), name


def test_a_shared_norm_is_one_for_all_sizes():
    network = _network()
    model = ResolutionSwitchable(network, SIZES, shared_norm=True)
    layers = [m for m in model.modules() if isinstance(m, SwitchableBatchNorm2d)]
    assert {len(layer.by_resolution) for layer in layers} == {1}
    plain = _network()
    assert model.count_parameters() == (sum(p.numel() for p in plain.parameters()), len(SIZES))
    for i, size in enumerate(SIZES, start=1):
        model(torch.randn(2, 3, size, size))
        assert layers[0].by_resolution[0].num_batches_tracked == i


def test_private_parameters_are_those_of_batchnorm_and_the_ensemble(model):
    shared, private = model.count_parameters()
    plain = _network()
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    in_norms = sum(p.numel() for m in norms for p in m.parameters())
    assert private == 3 * in_norms + 3
    assert shared == sum(p.numel() for p in plain.parameters()) - in_norms


def test_sizes_are_sorted_and_batchnorm_is_found_by_size(model):
    network = _network()
    shuffled = ResolutionSwitchable(network, (32, 48, 40)).eval()
    shuffled.load_state_dict(model.state_dict())
    assert shuffled.sizes == SIZES
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(shuffled(x), model(x, size=32))


def test_the_size_of_the_image_is_the_default(model):
    for i, size in enumerate(SIZES):
        model(torch.randn(1, 3, size, size))
        assert {layer.active for layer in model._norms} == {i}


def test_an_unknown_size_is_refused(model):
    with pytest.raises(ValueError, match="no BatchNorm for size 36; this network has 48 40 32"):
        model(torch.randn(1, 3, 36, 36))


@pytest.mark.parametrize("sizes", [(), (32, 32), (0, 32), (-1,)])
def test_malformed_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="distinct and positive"):
        ResolutionSwitchable(_network(), sizes)


def test_a_network_without_batchnorm_is_refused():
    with pytest.raises(ValueError, match="no BatchNorm"):
        make_switchable(nn.Linear(2, 2), 2)


def test_a_switchable_network_is_not_switched_again(model):
    with pytest.raises(ValueError, match="already"):
        make_switchable(model, 2)


def test_a_layer_in_two_places_stays_one_layer():
    norm = nn.BatchNorm2d(3)
    network = nn.Sequential(norm, nn.Sequential(nn.ReLU(), norm))
    make_switchable(network, 2)
    assert network[0] is network[1][1]
    assert isinstance(network[0], SwitchableBatchNorm2d)


def test_one_layer_under_two_names_is_replaced_under_both():
    network = nn.Module()
    network.first = nn.BatchNorm1d(3)
    network.second = network.first
    make_switchable(network, 2)
    assert network.second is network.first
    assert isinstance(network.second, SwitchableBatchNorm2d)


def test_syncbatchnorm_becomes_private():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    make_switchable(network, 2)
    assert all(isinstance(n, nn.SyncBatchNorm) for n in network[0].by_resolution)


def test_timms_batchnormact_keeps_its_activation_and_shares_it():
    plain = timm.create_model("efficientnet_lite0", num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = plain(x)
    model = ResolutionSwitchable(plain, (64, 48)).eval()
    torch.testing.assert_close(model(x, 48), expected)
    layer = next(m for m in model.modules() if isinstance(m, SwitchableBatchNorm2d))
    assert type(layer.by_resolution[0]).__name__ == "BatchNormAct2d"
    assert layer.by_resolution[0].act is layer.by_resolution[1].act
    assert layer.by_resolution[0].weight is not layer.by_resolution[1].weight


def test_deepcopy_switches_by_itself(model):
    x = torch.randn(1, 3, 32, 32)
    expected = model(x, 40)
    twin = copy.deepcopy(model)
    model.select(48)
    torch.testing.assert_close(twin(x, 40), expected)
    assert {layer.active for layer in model._norms} == {0}
    assert model.alpha is not twin.alpha


class _All(nn.Module):
    def __init__(self, model: ResolutionSwitchable) -> None:
        super().__init__()
        self.model = model

    def forward(self, *images):
        return self.model.forward_all(images)


@pytest.mark.slow  # test_compile.py has a smaller one
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_as_one_graph_it_still_switches():
    network = _network()
    model = _randomised(ResolutionSwitchable(network, SIZES)).eval()
    images = [torch.randn(2, 3, s, s) for s in SIZES]
    compiled = torch.compile(_All(model), backend="aot_eager", fullgraph=True)
    for ours, expected in zip(compiled(*images), model.forward_all(images), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exported_at_one_size_it_is_that_resolution(model):
    x = torch.randn(2, 3, 40, 40)
    exported = torch.export.export(model, (x,), {"size": 32}).module()
    model.select(48)
    torch.testing.assert_close(exported(x, size=32), model(x, 32), rtol=0, atol=0)


def test_a_state_that_lost_its_layers_versions_loads():
    """As a release's, or a selection of sizes; MNASNet asks for them."""
    model = ResolutionSwitchable(torchvision.models.MNASNet(0.1, num_classes=3), (64, 32))
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())

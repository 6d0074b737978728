"""The variables of the original's quantized training code, against its graph."""

from __future__ import annotations

import functools

import pytest
import torch

from pipelines.utils.errors import DataError
from rsnet.checkpoint.authors_tensorflow import from_tensorflow, is_of_model
from rsnet.checkpoint.weights import load_weights
from rsnet.models.factory import create_model
from rsnet.models.quantization.lq_nets import Quantizer, update_bases
from tests.helpers.tensorflow_graph import Graph, saved

# 33 pads unevenly at other places than 64; type A is for sizes that halve without a rest.
SIZES, EVEN_SIZES = (64, 33), (64, 32)
NETWORKS = {
    "resnet-18 2/32": (18, "resnet", 2, 32, SIZES),
    "resnet-50 32/32": (50, "resnet", 32, 32, SIZES),
    "preact-18 2/2": (18, "preact", 2, 2, SIZES),
    "preact-50 1/2": (50, "preact", 1, 2, SIZES),
    "typeA-18 2/2": (18, "preact_typeA", 2, 2, EVEN_SIZES),
    "typeA-50 2/3": (50, "preact_typeA", 2, 3, EVEN_SIZES),
}
UPDATES = 6


def _file(depth: int = 18, mode: str = "resnet", qw: int = 2, qa: int = 32, sizes=SIZES):
    """The original's graph, and what it saves."""
    graph, variables = _drawn(depth, mode, qw, qa, sizes)
    return graph, dict(variables)


@functools.cache  # half a second
def _drawn(depth: int, mode: str, qw: int, qa: int, sizes: tuple[int, int]):
    graph = Graph(depth, mode, qw, qa)
    return graph, saved(graph, sizes, debiased=UPDATES)


def _picked(variables):
    return {name: value for name, value in variables.items() if is_of_model(name)}


def _error(ours, theirs) -> float:
    """Of the picture that agrees best: in others an activation may lie at the edge of two levels, and
    take the other one, which goes on to the logits."""
    return ((ours - theirs).abs().flatten(1).amax(1).min() / theirs.abs().max()).item()


def _load(checkpoint):
    model = create_model(checkpoint.network).eval()
    load_weights(model, checkpoint.model, checkpoint.network.sizes)
    return model


@pytest.fixture(
    scope="module",
    params=[
        # Two of the three networks with 50 layers: 20 s each.
        pytest.param(network, marks=pytest.mark.slow if "-50" in name else ())
        for name, network in NETWORKS.items()
    ],
    ids=list(NETWORKS),
)
def imported(request):
    """The original's graph, its sizes, the checkpoint made of it, and the network of that."""
    *network, sizes = request.param
    graph, variables = _file(*network, sizes)
    checkpoint = from_tensorflow(_picked(variables))
    return graph, sizes, checkpoint, _load(checkpoint)


def test_the_network_is_read_off_the_variables(imported, request):
    graph, sizes, checkpoint, _ = imported
    network = checkpoint.network
    depth, mode, qw, qa, _ = NETWORKS[request.node.callspec.id]
    assert (network.arch, network.mode) == (f"parallel_resnet{depth}", mode)
    assert (network.qw, network.qa, network.sizes) == (qw, qa, sizes)
    assert (network.num_classes, network.classes) == (graph.classes, ())
    assert (network.tf_padding, network.normalize) == (True, "imagenet")
    assert torch.equal(checkpoint.model["alpha"], torch.tensor([1.5, 0.5]))


def test_logits_are_those_of_the_originals_graph(imported):
    graph, sizes, _, model = imported
    for size in sizes:
        image = torch.randn(4, 3, size, size)
        theirs = graph.network(image.flip(1).permute(0, 2, 3, 1), size)
        with torch.no_grad():
            ours = model(image)
        assert _error(ours, theirs) < 1e-5


def test_a_strided_block_is_the_originals(imported):
    graph, sizes, _, model = imported
    channels = 256 if graph.bottleneck else 64
    for size, length in zip(sizes, (8, 8 if graph.mode == "preact_typeA" else 9), strict=True):
        x = torch.randn(4, channels, length, length).relu()
        theirs = graph.block(
            x.permute(0, 2, 3, 1), "imagenet/group1/block0", 128, 2, size, first=True
        )
        model.select(size)
        with torch.no_grad():
            ours = model.network.layer2[0](x).permute(0, 2, 3, 1)
        assert ours.shape[1:3] == (-(-length // 2),) * 2
        assert _error(ours, theirs) < 1e-5


def test_a_basis_goes_on_from_its_moving_average():
    """total / (1 - rest) is the basis, and an update weighs as much as it would have there."""
    _, variables = _file(qw=2)
    known = _load(from_tensorflow(_picked(variables)))
    unknown = _load(
        from_tensorflow({k: v for k, v in _picked(variables).items() if "/basis/" not in k})
    )
    for model, weight in ((known, 0.1 / (1 - 0.9 ** (UPDATES + 1))), (unknown, 0.1)):
        quantizer = next(m for m in model.modules() if isinstance(m, Quantizer))
        before = quantizer.basis.clone()
        theirs = variables["imagenet/group0/block0/conv1/weight_quant/basis"]
        assert torch.equal(before, theirs.T)
        torch.testing.assert_close(quantizer.total / (1 - quantizer.rest), before)
        nothing = torch.zeros(64, 2, 4, dtype=torch.float64)
        nothing[:, 0] = 1  # a value of 0 with each code: the solution is 0
        update_bases([quantizer], [nothing])
        torch.testing.assert_close(quantizer.basis, (1 - weight) * before, rtol=1e-4, atol=1e-6)


def test_without_distillation_the_ensemble_starts_anew():
    _, variables = _file(qw=32)
    del variables["alpha"]
    checkpoint = from_tensorflow(_picked(variables))
    assert torch.equal(checkpoint.model["alpha"], torch.ones(2))
    assert checkpoint.network.qw == 32


def test_what_does_not_fit_is_listed_by_name_and_shape():
    _, variables = _file(mode="preact", qa=2)
    variables = _picked(variables)
    del variables["imagenet/group0/block1/bn-preact064/bn/beta"]
    variables["imagenet/group0/block1/conv9/W"] = torch.zeros(3, 3, 64, 64)
    variables["imagenet/conv0/W"] = torch.zeros(5, 5, 3, 64)
    variables["imagenet/group0/block0/quant1/ActivationQuantization/basis"] = torch.zeros(3, 1)
    with pytest.raises(DataError) as error:
        from_tensorflow(variables)
    assert "the variables do not fit parallel_resnet18: " in str(error.value)
    for part in (
        "imagenet/group0/block1/bn-preact064/bn/beta (64,) is missing",
        "imagenet/group0/block1/conv9/W (3, 3, 64, 64) is unknown",
        "imagenet/conv0/W is (5, 5, 3, 64), not (7, 7, 3, 64)",
        "imagenet/group0/block0/quant1/ActivationQuantization/basis is (3, 1), not (2, 1)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["conv0/bn", "linear/W"])
def test_what_tells_sizes_and_classes_has_to_be_there(name):
    _, variables = _file()
    variables = {k: v for k, v in _picked(variables).items() if name not in k}
    with pytest.raises(DataError, match="this is no network of the original's: "):
        from_tensorflow(variables)


def test_more_bits_than_a_quantizer_has_are_refused():
    _, variables = _file(qw=2)
    variables = {
        k: torch.zeros(12, v.shape[1]) if k.endswith("weight_quant/basis") else v
        for k, v in _picked(variables).items()
    }
    with pytest.raises(DataError, match="of 12 numbers: from 1 to 8 bits are known"):
        from_tensorflow(variables)


def test_an_unknown_depth_is_said():
    _, variables = _file()
    variables = {k: v for k, v in _picked(variables).items() if "group3/block1" not in k}
    with pytest.raises(DataError, match="groups of 2 2 2 1 blocks of 2 convolutions are of no"):
        from_tensorflow(variables)

"""The bases of the quantizers follow every update: all its sizes, batches and ranks, each counted once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipelines.batch import Batch
from rsnet.config.model_config import ModelConfig
from rsnet.distributed import process_group as distributed
from rsnet.evaluation.evaluate import evaluate
from rsnet.models.activation_checkpointing import convert_to_checkpointed
from rsnet.models.factory import create_model
from rsnet.models.quantization.encode import level_table
from rsnet.models.quantization.lq_nets import (
    ActivationQuantizer,
    BasisUpdater,
    Quantizer,
    WeightQuantizer,
    quantized_layers,
    solve_basis,
    weight_of,
)
from rsnet.training.objective import Objective
from rsnet.training.optim import LrSchedule, make_sgd
from rsnet.training.trainer import Trainer

SIZES = (48, 32)
DEVICE = torch.device("cpu")


def _network(fixed_qa: bool = False):
    torch.manual_seed(0)
    return create_model(
        ModelConfig(
            "parallel_resnet10", 4, SIZES, width_mult=0.125, stem="small", mode="preact", qw=2, qa=2
        ),
        fixed_qa=fixed_qa,
    ).to(memory_format=torch.channels_last)


def _batch(images: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = tuple(
        torch.randn(images, 3, s, s, generator=generator).to(memory_format=torch.channels_last)
        for s in SIZES
    )
    return Batch(x, torch.arange(images) % 4)


def _part(batch: Batch, part: slice) -> Batch:
    return Batch(tuple(x[part] for x in batch.images), batch.labels[part])


def _trainer(model, amp=None, norms_learn=True, lr=0.05, **options) -> Trainer:
    """Of `model`, as a run makes it. norms_learn: whether BatchNorm normalises by the batch."""
    sgd = make_sgd(model, lr, 0.9, 1e-4)
    schedule = LrSchedule(lr, "step", 100, 100)
    trainer = Trainer(
        Objective(model, "ens_topdown"),
        sgd,
        schedule,
        DEVICE,
        amp,
        bases=BasisUpdater(model, model.sizes),
        **options,
    )
    trainer.objective.train()
    if not norms_learn:  # then an image's activations do not depend on the other images
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    return trainer


def _quantizers(model) -> dict[str, Quantizer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}


def _bases(model) -> dict[str, torch.Tensor]:
    return {name: q.basis.clone() for name, q in _quantizers(model).items()}


def _watched(model):
    """What goes into every activation quantizer in training, by its name and its resolution."""
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for name, q in _quantizers(model).items():
        if isinstance(q, ActivationQuantizer):
            q.register_forward_pre_hook(
                lambda m, x, n=name: seen.__setitem__(
                    (n, m.active), x[0].detach().flatten().double()
                )
            )
    return seen


def test_every_size_moves_a_basis_once_and_all_read_the_same_one():
    model = _network()
    seen = _watched(model)
    before, trainer = _bases(model), _trainer(model, lr=0.0)
    trainer.forward_backward(_batch(8), last=True)
    assert all(torch.equal(v, before[n]) for n, v in _bases(model).items())
    trainer.update()
    for name, q in _quantizers(model).items():
        v = before[name].double()
        thresholds, _, codes = level_table(before[name], q.codes)
        total, rest = torch.zeros_like(v), 1.0
        for i in range(len(SIZES)):
            if isinstance(q, ActivationQuantizer):
                rows = seen[name, i][None]
            else:
                layer = model.get_submodule(name.removesuffix(".parametrizations.weight.0"))
                rows = weight_of(layer)[0].detach().flatten(1).double()
            rank = (rows[:, None] > thresholds[..., None]).sum(1) - 1
            code = codes.double().gather(1, rank[..., None].expand(-1, -1, 2))
            for c, x in enumerate(rows):
                b = code[c]
                squares = b.T @ b + 1e-4 * torch.eye(2)
                new = torch.linalg.solve(squares, b.T @ x + 1e-4 * v[c])
                total[c] = 0.9 * total[c] + 0.1 * new
            rest *= 0.9
            v = total / (1 - rest)
        torch.testing.assert_close(q.basis.double(), v, rtol=1e-4, atol=1e-6, msg=name)
        assert q.rest.item() == pytest.approx(0.9 ** len(SIZES))


def test_fixed_qa_follows_the_largest_size_alone():
    free, fixed = _network(), _network(fixed_qa=True)
    only_largest = _network()
    for model in (free, fixed):
        trainer = _trainer(model, lr=0.0)
        trainer.forward_backward(_batch(8), last=True)
        trainer.update()
    trainer = _trainer(only_largest, lr=0.0, sizes_at=lambda _: SIZES[:1])
    trainer.forward_backward(_batch(8), last=True)
    trainer.update()
    assert all(q.rest == pytest.approx(0.9) for q in _quantizers(only_largest).values())
    expected, found, other = _bases(only_largest), _bases(fixed), _bases(free)
    for name, q in _quantizers(fixed).items():
        if isinstance(q, ActivationQuantizer):
            assert torch.equal(found[name], expected[name])
            assert not torch.equal(found[name], other[name])
            assert not q.statistics  # of the smaller sizes, which would count in the next update
        else:
            assert torch.equal(found[name], other[name])


def test_accumulated_batches_count_as_one():
    batch, ends = _batch(8), []
    for parts in ([slice(0, 8)], [slice(0, 3), slice(3, 8)]):
        model = _network()
        trainer = _trainer(model, norms_learn=False, accumulate=len(parts))
        for part in parts:
            trainer.forward_backward(_part(batch, part), last=part is parts[-1])
        trainer.update()
        ends.append(_bases(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_all_ranks_count(monkeypatch):
    """Two ranks with half of the images each, one after the other; their sum is what both get."""
    batch, counted = _batch(8), []
    halves = [slice(0, 4), slice(4, 8)]

    def keep(statistics):
        counted.append(statistics)
        return statistics

    monkeypatch.setattr(distributed, "all_reduce_sum", keep)
    for half in halves:
        trainer = _trainer(_network(), norms_learn=False)
        trainer.forward_backward(_part(batch, half), last=True)
        trainer.update()
    whole = _network()
    trainer = _trainer(whole, norms_learn=False)
    trainer.forward_backward(batch, last=True)
    trainer.update()
    one, other, both = counted
    torch.testing.assert_close(one + other, both, rtol=1e-6, atol=1e-3)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda mine: mine + other)
    model = _network()
    trainer = _trainer(model, norms_learn=False)
    trainer.forward_backward(_part(batch, halves[0]), last=True)
    trainer.update()
    found = _bases(model)
    for name, value in _bases(whole).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "amp", [None, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
def test_recomputation_changes_no_bit_of_a_quantized_training(amp):
    ends = {}
    for what in ("nothing", "norm", "blocks"):
        model = _network()
        if what != "nothing":
            convert_to_checkpointed(model.network, what)
        trainer = _trainer(model, amp)
        for seed in (1, 2):
            trainer.forward_backward(_batch(4, seed), last=True)
            trainer.update()
        ends[what] = model.state_dict()
    expected = ends.pop("nothing")
    for found in ends.values():
        assert [name for name, v in expected.items() if not torch.equal(found[name], v)] == []


def test_an_update_that_is_left_out_leaves_the_bases_as_they_were():
    model = _network()
    trainer = _trainer(model, most_skipped=3)
    trainer.forward_backward(_batch(6), last=True)
    trainer.update()
    before = copy.deepcopy(model.state_dict())
    bad = _batch(6)
    bad.images[0][0, 0, 0, 0] = torch.nan
    trainer.forward_backward(bad, last=True)
    trainer.update()
    for name, q in _quantizers(model).items():
        for buffer in ("basis", "total", "rest"):
            assert torch.equal(getattr(q, buffer), before[f"{name}.{buffer}"]), (name, buffer)


def test_an_evaluation_moves_nothing():
    model = _network()
    before = copy.deepcopy(model.state_dict())
    evaluate(model, [_batch(6)], DEVICE)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not any(q.statistics for q in _quantizers(model).values())


def test_one_forward_gives_what_all_forwards_give():
    model = _network().eval()
    images = _batch(4).images
    with torch.no_grad():
        together = model.forward_all(images)
        for x, expected in zip(images, together, strict=True):
            assert torch.equal(model(x), expected)


def test_training_lowers_the_loss_and_the_basis_of_a_weight_follows_it():
    model = _network()
    trainer = _trainer(model)
    losses = []
    for _ in range(20):
        losses.append(trainer.forward_backward(_batch(8), last=True)["total"].item())
        trainer.update()
    assert losses[-1] < 0.5 * losses[0]
    for q in _quantizers(model).values():
        assert q.basis.isfinite().all()
        if isinstance(q, WeightQuantizer):
            assert q.rest < 0.9**39


def test_a_solution_needs_no_more_than_the_codes_that_occur():
    codes = torch.tensor([[[-1.0, -1], [-1, 1], [1, -1], [1, 1]]]).double()
    number = torch.tensor([[5.0, 0, 0, 7]])
    total = torch.tensor([[-10.0, 0, 0, 14]])
    basis = torch.tensor([[0.5, 0.3]]).double()
    found = solve_basis(basis, codes, torch.stack((number, total), 1).double())
    assert found.sum().item() == pytest.approx(2, rel=1e-4)  # all that the values say
    assert (found[0, 0] - found[0, 1]).item() == pytest.approx(0.2)  # what they do not say stays


@pytest.mark.parametrize(
    "arch",
    [
        "parallel_mobilenetv2",
        pytest.param("parallel_densenet121", marks=pytest.mark.slow),
        pytest.param("parallel_efficientnet_b0", marks=pytest.mark.slow),
        pytest.param("parallel_regnet_y_400mf", marks=pytest.mark.slow),
        "parallel_timm/resnet10t",
    ],
)
def test_weights_of_other_networks_are_quantized_too(arch):
    width_mult = 0.25 if arch == "parallel_mobilenetv2" else 1.0
    config = ModelConfig(arch, 4, SIZES, width_mult=width_mult, qw=3)
    model = create_model(config).to(memory_format=torch.channels_last)
    layers = quantized_layers(model)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == len(convolutions) - 1
    before, trainer = _bases(model), _trainer(model, torch.bfloat16)
    trainer.forward_backward(_batch(4), last=True)
    for layer in layers:
        assert weight_of(layer)[0].grad is not None
        assert len(layer.weight[0].unique()) <= 2**3
    trainer.update()
    for name, basis in _bases(model).items():
        assert basis.isfinite().all()
        assert not torch.equal(basis, before[name])

"""The training step against a plain one, and what it must not do."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.batch import Batch, LoaderSpec
from pipelines.synthetic import SyntheticOptions, make_loaders
from pipelines.utils.errors import RunError
from rsnet.evaluation.evaluate import evaluate
from rsnet.models.autocast import autocast
from rsnet.models.fold import fold_batchnorm
from rsnet.models.state_dict import select_sizes
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.training import loop, nonfinite
from rsnet.training.loop import train_one_epoch
from rsnet.training.mixup import Mixup
from rsnet.training.objective import Objective, SizeSampler
from rsnet.training.optim import LrSchedule, ModelEma, make_sgd
from rsnet.training.trainer import Trainer, raise_if_not_finite

SIZES = (40, 32, 24)
CPU = torch.device("cpu")


def _tiny() -> nn.Module:
    """Two convolutions with BatchNorm, so that a test is done in milliseconds."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def _trainer(model: ResolutionSwitchable, lr: float = 0.1, **more) -> Trainer:
    sgd = make_sgd(model, lr, 0.9, 1e-3)
    schedule = LrSchedule(lr, "schedule", steps=100, steps_per_epoch=10)
    return Trainer(Objective(model, "ens_topdown"), sgd, schedule, CPU, **more)


def _loader(images: int = 64, batch_size: int = 8, dtype: torch.dtype = torch.float32):
    spec = LoaderSpec("", SIZES, batch_size, CPU, dtype)
    return make_loaders(SyntheticOptions(images, 20, 5), spec)


def _plain_step(networks, alpha, velocity, batch, lr):
    """The method written out: networks that share all but their norms, every term by hand."""
    logits = [net(x) for net, x in zip(networks, batch.images, strict=True)]
    weights = torch.exp(alpha) / torch.exp(alpha).sum()
    ensemble = sum(w * z.detach() for w, z in zip(weights, logits, strict=True))
    loss = sum(F.cross_entropy(z, batch.labels) for z in [*logits, ensemble])
    n = len(logits)
    for j, student in enumerate(logits):
        for teacher in [ensemble, *logits[:j]]:
            p = teacher.detach().softmax(1)
            pair = (p * (p.log() - student.log_softmax(1))).sum() / len(p)
            loss = loss + 2 / (n + 1) * pair
    parameters = [*{id(p): p for net in networks for p in net.parameters()}.values(), alpha]
    for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        v = velocity.setdefault(id(p), torch.zeros_like(p))
        v.mul_(0.9).add_(grad + 1e-3 * p.detach())
        p.data.sub_(lr * v)
    return loss.item()


def test_weights_of_samples_scale_their_gradients():
    """With weights 0 and 2, as half of the batch alone."""
    batch = next(iter(_loader().train))
    weights = torch.tensor([2.0, 0, 2, 0, 0, 2, 0, 2])
    half = weights > 0
    model = ResolutionSwitchable(_tiny(), SIZES).eval()  # BatchNorm would see other samples
    gradients = []
    for given in (
        Batch(batch.images, batch.labels, weights),
        Batch(tuple(x[half] for x in batch.images), batch.labels[half]),
    ):
        trainer = _trainer(copy.deepcopy(model))
        trainer.forward_backward(given, last=True)
        gradients.append([p.grad for p in trainer.objective.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_steps_equal_the_method_written_out():
    model = ResolutionSwitchable(_tiny(), SIZES).double()
    networks = []
    for i in range(3):
        net = copy.deepcopy(model.network)
        for name, module in list(net.named_children()):
            if hasattr(module, "by_resolution"):
                setattr(net, name, module.by_resolution[i])
            elif networks:
                setattr(net, name, networks[0].get_submodule(name))
        networks.append(net)
    alpha = model.alpha.detach().clone().requires_grad_()
    trainer, velocity = _trainer(model), {}
    trainer.objective.train()
    for _ in range(4):
        images = tuple(torch.randn(6, 3, s, s, dtype=torch.float64) for s in SIZES)
        batch = Batch(images, torch.randint(0, 5, (6,)))
        ours = trainer.forward_backward(batch, last=True)["total"].item()
        trainer.update()
        assert ours == pytest.approx(_plain_step(networks, alpha, velocity, batch, 0.1), rel=1e-6)
    torch.testing.assert_close(model.alpha.detach(), alpha.detach(), rtol=1e-6, atol=0)
    for name, net in zip("012", networks, strict=True):
        ours = model.network[1].by_resolution[int(name)]
        torch.testing.assert_close(ours.weight, net[1].weight)
        torch.testing.assert_close(ours.running_var, net[1].running_var)
    torch.testing.assert_close(model.network[3].weight, networks[0][3].weight)


def test_gradients_of_shared_weights_add_up_in_float32():
    """With autocast's weight cache the five gradients would be summed in bfloat16."""
    model = ResolutionSwitchable(_tiny(), SIZES)
    images = tuple(torch.randn(4, 3, s, s) for s in SIZES)
    batch = Batch(images, torch.arange(4))
    single = []
    for i, size in enumerate(SIZES):
        twin = copy.deepcopy(model)
        with autocast(CPU, torch.bfloat16):
            loss = F.cross_entropy(twin(images[i], size).float(), batch.labels)
        loss.backward()
        single.append(twin.network[0].weight.grad)
    with autocast(CPU, torch.bfloat16):
        logits = model.forward_all(images)
    sum(F.cross_entropy(z.float(), batch.labels) for z in logits).backward()
    exact = sum(single)
    error = (model.network[0].weight.grad - exact).norm() / exact.norm()
    assert error < 1e-5


def test_accumulated_batches_are_one_large_batch():
    """Without BatchNorm, whose statistics are a batch's own: it is left in evaluation mode."""
    one, two = (ResolutionSwitchable(_tiny(), SIZES).eval() for _ in range(2))
    two.load_state_dict(one.state_dict())
    images = tuple(torch.randn(8, 3, s, s) for s in SIZES)
    labels = torch.randint(0, 5, (8,))
    whole, halves = _trainer(one), _trainer(two, accumulate=2)
    whole.forward_backward(Batch(images, labels), last=True)
    whole.update()
    for part, last in ((slice(4), False), (slice(4, 8), True)):
        halves.forward_backward(Batch(tuple(x[part] for x in images), labels[part]), last)
    halves.update()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_clipping_bounds_the_update():
    model = ResolutionSwitchable(_tiny(), SIZES)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = Trainer(
        Objective(model, None),
        make_sgd(model, 1.0, 0.0, 0.0),
        LrSchedule(1.0, "schedule", 10, 10),
        CPU,
        clip_grad=1e-3,
    )
    trainer.forward_backward(
        Batch(tuple(torch.randn(4, 3, s, s) for s in SIZES), torch.arange(4)), True
    )
    trainer.update()
    moved = [(a.detach() - b).norm() for a, b in zip(model.parameters(), before, strict=True)]
    assert math.hypot(*moved) == pytest.approx(1e-3, rel=1e-3)


def test_sizes_that_are_left_out_of_a_step_are_not_touched():
    model = ResolutionSwitchable(_tiny(), SIZES)
    trainer = _trainer(model, sizes_at=lambda step: (40, 24) if step == 0 else None)
    trainer.objective.train()
    before = copy.deepcopy(model.state_dict())
    batch = Batch(tuple(torch.randn(4, 3, s, s) for s in SIZES), torch.arange(4))
    terms = trainer.forward_backward(batch, last=True)
    trainer.update()
    assert set(terms) == {"ce/40", "ce/24", "ce/ensemble", "kd", "total"}
    untouched = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
    assert untouched == {k for k in before if ".by_resolution.1." in k}
    assert torch.equal(model.alpha[1], before["alpha"][1] * (1 - 0.1 * 1e-3))  # decay alone
    assert "ce/32" in trainer.forward_backward(batch, last=True)


def test_a_step_of_some_sizes_is_the_method_of_those_sizes():
    """The same losses as a network of these sizes alone has."""
    model = ResolutionSwitchable(_tiny(), SIZES)
    torch.nn.init.normal_(model.alpha)
    part = ResolutionSwitchable(_tiny(), (40, 24))
    part.load_state_dict(select_sizes(model.state_dict(), SIZES, (40, 24)))
    images = tuple(torch.randn(4, 3, s, s) for s in SIZES)
    labels = torch.arange(4)
    ours = Objective(model, "ens_topdown")(images, labels, (40, 24))
    expected = Objective(part, "ens_topdown")((images[0], images[2]), labels)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)


def test_drawn_sizes_have_the_largest_always_and_the_others_alike_often():
    sampler = SizeSampler({0: (96, 224, 160, 128)}, k=2, seed=3)
    drawn = [sampler.at(step) for step in range(3000)]
    assert {sizes[0] for sizes in drawn} == {224}
    for size in (160, 128, 96):
        assert sum(size in sizes for sizes in drawn) == pytest.approx(1000, abs=100)
    assert drawn[:50] == [SizeSampler({0: (224, 160, 128, 96)}, 2, 3).at(s) for s in range(50)]
    assert drawn[:50] != [SizeSampler({0: (224, 160, 128, 96)}, 2, 4).at(s) for s in range(50)]
    assert SizeSampler({0: (32, 16, 24)}, 3, 0).at(0) == (32, 24, 16)


def test_mixed_labels_are_the_weighted_sum_of_two_losses():
    model = ResolutionSwitchable(_tiny(), SIZES).eval()
    images = tuple(torch.randn(4, 3, s, s) for s in SIZES)
    one, two = torch.arange(4), torch.tensor([3, 0, 1, 2])
    shares = 0.3 * F.one_hot(one, 5).float() + 0.7 * F.one_hot(two, 5).float()
    objective = Objective(model, "ens_topdown", 0.1)
    mixed, a, b = (objective(images, labels) for labels in (shares, one, two))
    for name in ("ce/40", "ce/32", "ce/24", "ce/ensemble"):
        torch.testing.assert_close(mixed[name], 0.3 * a[name] + 0.7 * b[name])


def test_each_batch_of_an_accumulated_update_is_mixed_by_a_number_of_its_own():
    numbers = []

    def mix(batch, number):
        numbers.append(number)
        return batch

    trainer = _trainer(ResolutionSwitchable(_tiny(), SIZES), accumulate=2, mix=mix)
    for _ in range(2):
        train_one_epoch(trainer, _loader(40).train, 100, lambda _: None)
    assert numbers == list(range(8))


def test_averaged_weights_follow_the_updates():
    model = ResolutionSwitchable(_tiny(), SIZES)
    ema = ModelEma(model, 0.5)
    trainer = _trainer(model, ema=ema)
    expected = model.network[0].weight.detach().clone()
    trainer.objective.train()
    for step, batch in enumerate(_loader(24).train):
        trainer.forward_backward(batch, last=True)
        trainer.update()
        d = min(0.5, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * model.network[0].weight.detach()
    torch.testing.assert_close(ema.model.network[0].weight, expected)


def test_an_epoch_reports_means_and_counts_its_steps():
    trainer, reports = _trainer(ResolutionSwitchable(_tiny(), SIZES)), []
    train_one_epoch(trainer, _loader().train, 3, reports.append)
    assert [r.steps_in_epoch for r in reports] == [3, 6, 8]
    assert trainer.step == 8
    terms = {"ce/40", "ce/32", "ce/24", "ce/ensemble", "kd", "total"}
    assert all(set(r.terms) == terms for r in reports)
    assert all(r.images_per_s > 0 and r.step_time >= r.data_time >= 0 for r in reports)


def test_batches_that_do_not_fill_an_update_are_left_out():
    trainer = _trainer(ResolutionSwitchable(_tiny(), SIZES), accumulate=3)
    train_one_epoch(trainer, _loader().train, 100, lambda _: None)
    assert trainer.step == 8 // 3


def test_training_learns_a_tiny_data_set():
    trainer, losses = _trainer(ResolutionSwitchable(_tiny(), SIZES)), []
    loader = _loader(8, 8).train
    for _ in range(30):
        train_one_epoch(trainer, loader, 1, lambda r: losses.append(r.terms["ce/40"]))
    assert losses[-1] < 0.3 * losses[0]


class _CountsReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a value of a tensor."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero):
            self.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_only_reports_wait_for_the_device_not_steps(amp):
    model = ResolutionSwitchable(_tiny(), SIZES)
    trainer = _trainer(
        model,
        amp=amp,
        clip_grad=1.0,
        sizes_at=SizeSampler({0: SIZES}, 2, 0).at,
        mix=Mixup(0.2, 1.0, 5, 0),
        ema=ModelEma(model, 0.9),
    )
    train_one_epoch(
        trainer, _loader().train, 100, lambda _: None
    )  # the optimizer's first step differs
    reads = {}
    for steps in (4, 8):
        with _CountsReads() as counter:
            train_one_epoch(trainer, _loader(8 * steps).train, 100, lambda _: None)
        reads[steps] = counter.reads
    assert 0 < reads[4] == reads[8]


@pytest.mark.parametrize("amp", [None, torch.float16])
def test_a_loss_that_is_not_finite_stops_before_the_update(amp):
    model = ResolutionSwitchable(_tiny(), SIZES)
    trainer = _trainer(model, amp=amp)
    loader = _loader(64, 8)
    poisoned = []
    for i, batch in enumerate(loader.train):
        bad = torch.full_like(batch.images[1], torch.nan) if i == 3 else batch.images[1]
        poisoned.append(Batch((batch.images[0], bad, batch.images[2]), batch.labels))
    weights: list[list[torch.Tensor]] = []

    class Watched(list):
        def __iter__(self):
            for batch in super().__iter__():
                weights.append([p.detach().clone() for p in model.parameters()])
                yield batch

    with pytest.raises(RunError, match=r"not finite at step 3: ce/32, ce/ensemble, kd;"):
        train_one_epoch(trainer, Watched(poisoned), 100, lambda _: None)
    for p, before in zip(model.parameters(), weights[3], strict=True):
        assert torch.equal(p, before)


def test_evaluation_leaves_the_network_as_it_was():
    model = ResolutionSwitchable(_tiny(), SIZES).train()
    before = copy.deepcopy(model.state_dict())
    results = evaluate(model, _loader().val, CPU)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(results) == ["40", "32", "24", "ensemble"]


def test_evaluation_is_a_plain_loop_over_the_images():
    model = ResolutionSwitchable(_tiny(), SIZES)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    results = evaluate(model, _loader().val, CPU)
    model.eval()
    right = total = loss = 0
    for batch in _loader().val:
        logits = model(batch.images[1], 32)
        right += (logits.argmax(1) == batch.labels).sum().item()
        loss += torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum").item()
        total += len(batch.labels)
    assert results["32"]["top1"] == pytest.approx(100 * right / total)
    assert results["32"]["loss"] == pytest.approx(loss / total, rel=1e-5)


@torch.no_grad()
def test_an_evaluation_in_half_precision_is_the_networks_but_for_its_rounding():
    model = ResolutionSwitchable(_tiny(), SIZES)
    results = evaluate(model, _loader().val, CPU, torch.bfloat16)
    exact = evaluate(model, _loader().val, CPU)
    assert results["24"]["loss"] == pytest.approx(exact["24"]["loss"], rel=1e-2)
    assert results["24"]["loss"] != exact["24"]["loss"]


@torch.no_grad()
def test_an_evaluation_in_half_precision_casts_each_weight_once(monkeypatch):
    networks = []

    def fold(model, size):
        networks.append(fold_batchnorm(model, size))
        return networks[-1]

    monkeypatch.setattr("rsnet.evaluation.evaluate.fold_batchnorm", fold)
    model = ResolutionSwitchable(_tiny(), SIZES)
    evaluate(model, _loader().val, CPU, torch.bfloat16)
    weights = [m.weight for n in networks for m in n.modules() if isinstance(m, nn.Conv2d)]
    assert len(networks) == len(SIZES)
    assert {w.dtype for w in weights} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenet_v2"])
def test_channels_last_survives_every_convolution(arch):
    network = torchvision.models.get_model(arch, num_classes=5)
    model = ResolutionSwitchable(network, SIZES).to(memory_format=torch.channels_last)
    lost = []

    def check(module, _inputs, output):
        if not output.is_contiguous(memory_format=torch.channels_last):
            lost.append(module)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(check)
    images = tuple(torch.randn(2, 3, s, s).to(memory_format=torch.channels_last) for s in SIZES)
    with autocast(CPU, torch.bfloat16):
        model.forward_all(images)
    assert not lost


class _NanGradient(torch.autograd.Function):
    """What it returns is as it was, and what comes back is NaN."""

    @staticmethod
    def forward(_context, x):
        return x.clone()

    @staticmethod
    def backward(_context, gradient):
        return gradient * torch.nan


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("most_skipped", [0, 1])
def test_gradients_that_are_not_finite_leave_weights_and_statistics_alone(
    clip_grad, most_skipped, monkeypatch
):
    torch.manual_seed(0)
    model = ResolutionSwitchable(_tiny(), SIZES)
    trainer = _trainer(model, clip_grad=clip_grad, most_skipped=most_skipped)
    batches = list(_loader().train)
    objective = trainer.objective.forward

    def broken(*arguments):
        terms = objective(*arguments)
        return terms | {"total": _NanGradient.apply(terms["total"])}

    trainer.forward_backward(batches[0], last=True)
    trainer.update()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(trainer.objective, "forward", broken)
    trainer.forward_backward(batches[1], last=True)
    trainer.update()
    after = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    # Without --on-nonfinite skip the training ends here, and nothing puts statistics back.
    for name in before if most_skipped else parameters:
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(after[name], before[name]), name
    if most_skipped:
        raise_if_not_finite(trainer)
        assert trainer.guard.skipped() == 1
        monkeypatch.undo()
        trainer.forward_backward(batches[2], last=True)
        trainer.update()
        assert not torch.equal(model.state_dict()["network.0.weight"], before["network.0.weight"])
    else:
        with pytest.raises(
            RunError, match=r"^a gradient is not finite at step 1, although the loss"
        ):
            raise_if_not_finite(trainer)


def test_images_a_second_are_those_since_the_last_report(monkeypatch):
    monkeypatch.setattr(loop._LoaderClock, "lap", lambda _: (2.0, 0.5))
    reports = []
    trainer = _trainer(ResolutionSwitchable(_tiny(), SIZES))
    train_one_epoch(trainer, _loader(64, 8).train, 3, reports.append)
    assert [report.images_per_s for report in reports] == [12, 12, 8]


@pytest.mark.parametrize("broken", [None, 0, 1, 2])
def test_ranks_agree_once_an_update_on_what_is_not_finite_in_any_of_its_batches(
    monkeypatch, broken
):
    reduced = []
    monkeypatch.setattr(
        nonfinite.distributed, "all_reduce_max", lambda value: reduced.append(value) or value
    )
    model = ResolutionSwitchable(_tiny(), SIZES)
    trainer = _trainer(model, accumulate=3, most_skipped=5)
    before = [p.detach().clone() for p in model.parameters()]
    for i, batch in zip(range(3), _loader().train, strict=False):
        bad = torch.full_like(batch.images[1], torch.nan) if i == broken else batch.images[1]
        images = (batch.images[0], bad, batch.images[2])
        trainer.forward_backward(Batch(images, batch.labels), last=i == 2)
    trainer.update()
    assert len(reduced) == 1
    assert trainer.guard.skipped() == (broken is not None)
    same = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert all(same) if broken is not None else not any(same)

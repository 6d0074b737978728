"""`--compile`: the same training, and one line where there is no compiler."""

from __future__ import annotations

import sys
from itertools import islice

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from pipelines.batch import LoaderSpec
from pipelines.dali import DaliOptions
from pipelines.dali import make_loaders as make_dali
from pipelines.synthetic import SyntheticOptions, make_loaders
from rsnet import train as run
from rsnet.config.command_line import parse
from rsnet.config.model_config import FULL
from rsnet.config.resolve import resolve
from rsnet.config.size_schedule import step_sets
from rsnet.evaluation.evaluate import evaluate
from rsnet.models import resnet
from rsnet.models.preact_resnet import Activation, Block
from rsnet.models.quantization.lq_nets import quantize
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.models.teacher import Teacher
from rsnet.profiler.step_profiler import time_steps
from rsnet.training.trainer import make_trainer

SIZES = (32, 24, 16)
LINE = "--arch parallel_resnet10 --width-mult 0.25 --stem small --sizes 32 24 16 -b 4 --amp off"


def _network(qw: int, qa: int) -> nn.Sequential:
    """The layers of a ResNet with one block, quantized or not: one of four stages takes three times as long
    to compile."""
    if qw == FULL:
        block = BasicBlock(8, 16, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16)))
        first = [nn.BatchNorm2d(8), nn.ReLU()]
    else:
        block = Block(8, 16, 2, bottleneck=False, shortcut="B", before="nothing")
        first = [Activation(8)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *first, block, *head)
    quantize(network, qw, qa)
    return network


def _trainer(*more: str, dtype=torch.float32, teacher=None):
    config, _ = parse(DaliOptions, ["--data", "d", *LINE.split(), *more])
    config = resolve(config, world_size=1, device_type="cpu", has_bf16=False)
    torch.manual_seed(0)
    model = ResolutionSwitchable(_network(config.qw, config.qa), SIZES)
    model = model.to(dtype, memory_format=torch.channels_last)
    trainer = make_trainer(config, model, 10, 100, torch.device("cpu"), teacher=teacher)
    return trainer, model


def _batches(dtype=torch.float32):
    spec = LoaderSpec("d", SIZES, 4, torch.device("cpu"), dtype)
    return make_loaders(SyntheticOptions(train_images=16, val_images=6, classes=10), spec)


@pytest.fixture
def batches():
    return _batches()


QUANTIZED = ["--mode", "preact", "--qw", "2", "--qa", "2"]


# Rounding moves values to another level: quantized weights that start 1e-7 apart, both trained eagerly, have
# gradients 1 % apart in the first update and 90 % in the second, just as compiled ones have. In float64 no
# value comes that close to a threshold.
@pytest.mark.slow  # minutes of compilation
@pytest.mark.parametrize(
    ("kind", "updates", "dtype"), [([], 3, torch.float32), (QUANTIZED, 1, torch.float64)]
)
def test_a_compiled_training_is_the_eager_one(kind, updates, dtype):
    """A graph of K = 2 sizes, the same in all of the updates, and the evaluation, which is not compiled."""
    ends, batches = [], _batches(dtype)
    for more in (["--compile"], []):
        trainer, model = _trainer("--sizes-per-step", "2", *kind, *more, dtype=dtype)
        trainer.objective.train()
        for batch in islice(batches.train, updates):
            trainer.forward_backward(batch, last=True)
            trainer.update()
        ends.append((model.state_dict(), evaluate(model, batches.val, torch.device("cpu"))))
    (found, accuracy), (expected, wanted) = ends
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert accuracy["32"]["loss"] == pytest.approx(wanted["32"]["loss"], rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], QUANTIZED])
def test_a_compiled_step_is_one_graph(batches, monkeypatch, kind):
    """Whatever compiles it: nothing in a step breaks the graph, and no later step compiles anew.

    The teacher's forward is another.
    """
    graphs = []

    def backend(module, _inputs):
        graphs.append(module)
        return module.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: real(f, backend=backend, **more))
    teacher = Teacher(resnet.scaled_resnet("resnet10", 10, 0.125).eval(), (24,), SIZES)
    trainer, model = _trainer("--compile", *kind, teacher=teacher)
    times = time_steps(trainer, model, iter([b for b in batches.train for _ in range(2)]), 3)
    assert len(graphs) == 2
    assert list(times.parts) == ["data", "forward and backward", "optimizer"]
    evaluate(model, batches.val, torch.device("cpu"))
    assert len(graphs) == 2
    # Counted outside, all at once: in the graph, each counter would be an operation of its own.
    assert not [
        node for g in graphs for node in g.graph.nodes if "num_batches_tracked" in node.name
    ]
    counters = [v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")]
    assert {int(counter) for counter in counters} == {trainer.step}


@pytest.mark.slow
def test_other_sizes_of_a_step_are_another_graph_with_the_eager_losses(batches, monkeypatch):
    """At seed 0, the fourth update is the first with 32 and 24 in place of 32 and 16."""
    graphs = []

    def backend(module, _inputs):
        graphs.append(module)
        return module.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: real(f, backend=backend, **more))
    losses, counts = {}, []
    for more in ("--compile", "--no-compile"):
        trainer, _ = _trainer("--sizes-per-step", "2", more)
        trainer.objective.train()
        losses[more] = []
        for batch in islice(batches.train, 4):
            losses[more].append(trainer.forward_backward(batch, last=True)["total"].item())
            trainer.update()
            counts.append(len(graphs))
    assert counts == [1, 1, 1, 2, 2, 2, 2, 2]
    assert losses["--compile"] == pytest.approx(losses["--no-compile"], rel=1e-5)


@pytest.mark.slow
def test_without_a_compiler_there_is_one_line(photos, tmp_path, monkeypatch, capsys):
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    words = [
        "--data",
        photos,
        *LINE.split(),
        "--output",
        tmp_path / "run",
        "--epochs",
        1,
        "--compile",
    ]
    monkeypatch.setattr(sys, "argv", ["train_dali.py", *map(str, words), "--wandb", "disabled"])
    assert run.main("train_dali.py", DaliOptions, make_dali) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_dali.py: error: --compile: ")
    assert line.endswith("; train without it")


def test_every_set_of_sizes_is_compiled_however_many_there_are(monkeypatch):
    """torch stops after eight, and runs the rest eagerly: of eleven here."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    compile_with = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda m, **more: compile_with(m, backend=backend, **more)
    )
    sizes = (14, 12, 10, 8, 6)
    words = "--compile --sizes 14 12 10 8 6 --sizes-per-step 2 --epochs 5 --size-schedule"
    words += " 0:6 1:8,6 2:10,8,6 3:12,10,8,6 4:all"
    config, _ = parse(DaliOptions, ["--data", "d", *words.split(), "--amp", "off"])
    config = resolve(config, world_size=1, device_type="cpu", has_bf16=False)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    trainer = make_trainer(config, ResolutionSwitchable(network, sizes), 3, 40, torch.device("cpu"))
    images, labels = tuple(torch.randn(2, 3, s, s) for s in sizes), torch.tensor([0, 1])
    sets = [(6,), *((largest, other) for largest in sizes for other in sizes if other < largest)]
    for count, chosen in enumerate(sets, 1):
        trainer.objective(images, labels, chosen)
        assert len(compiled) == count
    assert count == step_sets(config.phases, 2) == 11

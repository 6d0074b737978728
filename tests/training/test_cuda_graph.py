"""`--cuda-graphs`: the numbers of the eager training, and what is said where there are no graphs.

Without a GPU a stand-in records operations and repeats them: whatever Python decides, reads or replaces in a
step shows in the numbers.
"""

from __future__ import annotations

import gc
import struct
import weakref

import pytest
import torch
from torch import nn

from pipelines.batch import Batch
from pipelines.utils.errors import UsageError
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import resolve
from rsnet.config.train_config import TrainConfig
from rsnet.models.factory import create_model
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.models.teacher import Teacher
from rsnet.profiler.step_profiler import time_steps
from rsnet.training.cuda_graph import AHEAD, WARM_UP
from rsnet.training.mixup import Mixup
from rsnet.training.objective import Objective
from rsnet.training.optim import LrSchedule, ModelEma, make_optimizer
from rsnet.training.state import load_training_state, training_state
from rsnet.training.trainer import Trainer, make_trainer, require_trainable
from tests.helpers.cuda_graphs import FakeCuda

SIZES = (16, 12, 8)
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
UPDATES = WARM_UP + 4


class _Rounded(LrSchedule):
    """Rates that are a float32: a graph's are."""

    def at(self, step):
        return struct.unpack("f", struct.pack("f", super().at(step)))[0]


def _model(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    return ResolutionSwitchable(network, SIZES).to(memory_format=torch.channels_last)


def _trainer(model, ema=0.0, mixup=0.0, taught=False, layer_decay=1.0, **more):
    if taught:
        more["teacher"] = Teacher(_model(1).eval(), (12,), SIZES)
    schedule = _Rounded(0.3, "cosine", steps=2 * UPDATES, steps_per_epoch=UPDATES, warmup_steps=2)
    mix = Mixup(mixup, mixup, 5, 0) if mixup else None
    return Trainer(
        Objective(model, "ens_topdown", 0.1),
        make_optimizer(model, "plain", 0.3, 0.9, 1e-2, layer_decay=layer_decay), schedule, CPU, mix=mix,
        ema=ModelEma(model, ema) if ema else None, **more,
    )  # fmt: skip


def _batches(count, bad=()):
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        images = tuple(torch.randn(4, 3, s, s, generator=generator) for s in SIZES)
        images[1][0] += torch.nan if i in bad else 0.0
        found.append(
            Batch(
                tuple(x.contiguous(memory_format=torch.channels_last) for x in images),
                torch.randint(0, 5, (4,), generator=generator),
            )
        )
    return found


def _train(trainer, batches, evaluates=True):
    """Train, with an evaluation in the middle; return all that a checkpoint would keep."""
    model = trainer.objective.model
    trainer.objective.train()
    for i, batch in enumerate(batches, start=1):
        last = i % trainer.accumulate == 0
        trainer.means.add(trainer.forward_backward(batch, last))
        if last:
            trainer.update()
        if evaluates and i == len(batches) - trainer.accumulate:
            trainer.objective.eval()
            with torch.no_grad():
                model(batch.images[0])
            trainer.objective.train()
    return training_state(trainer, model)


def _assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            _assert_same(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            _assert_same(*pair)
    else:
        assert found == expected


VARIANTS = {
    "plain": ({}, 1),
    "bfloat16, clipping, averaged weights": (
        {"amp": torch.bfloat16, "clip_grad": 0.5, "ema": 0.9},
        1,
    ),
    "mixed samples, accumulated": ({"accumulate": 3, "mixup": 0.4, "most_skipped": 2}, 3),
    "a teacher, accumulated": ({"accumulate": 2, "taught": True}, 2),
    "rates by layer": ({"layer_decay": 0.5}, 1),
    "float16, accumulated": ({"amp": torch.float16, "accumulate": 2, "clip_grad": 0.5}, 2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_replayed_updates_are_the_eager_ones_to_the_bit(name, monkeypatch):
    """With a rate that changes, an evaluation in between, random numbers, and a batch that is left out."""
    cuda, said = FakeCuda(monkeypatch), []
    more, graphs = VARIANTS[name]
    accumulate = more.get("accumulate", 1)
    bad = [(WARM_UP + 2) * accumulate] if more.get("most_skipped") else []
    ends = []
    for cuda_graphs in (False, True):
        trainer = _trainer(_model(), **more, cuda_graphs=cuda_graphs, say=said.append)
        ends.append(_train(trainer, _batches(UPDATES * accumulate, bad)))
    _assert_same(ends[1], ends[0])
    assert not said
    assert [g.replays for g in cuda.graphs] == [UPDATES - WARM_UP] * graphs
    assert len(cuda.unfinished) == min(AHEAD, UPDATES - WARM_UP)
    assert ends[0]["guard"][1] == len(bad)
    assert {type(group["lr"]) for group in ends[1]["optimizer"]["param_groups"]} == {float}


def test_one_update_too_many_that_is_not_finite_is_named_as_eagerly(monkeypatch):
    FakeCuda(monkeypatch)
    bad = [WARM_UP, WARM_UP + 2, WARM_UP + 3]
    verdicts = []
    for cuda_graphs in (False, True):
        trainer = _trainer(_model(), most_skipped=1, cuda_graphs=cuda_graphs)
        _train(trainer, _batches(UPDATES, bad))
        verdicts.append(trainer.guard.verdict())
    assert verdicts == [(WARM_UP + 3, ["ce/12", "ce/ensemble", "kd", "total"])] * 2


def test_a_run_with_graphs_goes_on_from_its_checkpoint_to_the_bit(monkeypatch):
    FakeCuda(monkeypatch)
    batches, more = _batches(2 * UPDATES), {"amp": torch.float16, "ema": 0.9, "most_skipped": 1}
    whole = _train(_trainer(_model(), **more), batches, evaluates=False)
    state = _train(_trainer(_model(), **more, cuda_graphs=True), batches[:UPDATES], False)
    model = _model(seed=1)
    trainer = _trainer(model, **more, cuda_graphs=True)
    model.load_state_dict(state["model"])
    network = ModelConfig("parallel_resnet18", 5, SIZES)
    load_training_state(trainer, model, Checkpoint(network=network, config={}, **state))
    trainer.step = state["step"]
    _assert_same(_train(trainer, batches[UPDATES:], evaluates=False), whole)


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_capture_that_fails_is_said_once_and_the_numbers_stay(fails, monkeypatch):
    """Also if the batches before it, of the same update, were replayed."""
    cuda, said = FakeCuda(monkeypatch, fail_at=[fails]), []
    more = {"amp": torch.float16, "accumulate": 3, "clip_grad": 0.5}
    batches = _batches(3 * UPDATES)
    whole = _train(_trainer(_model(), **more), batches)
    trainer = _trainer(_model(), **more, cuda_graphs=True, say=said.append)
    _assert_same(_train(trainer, batches), whole)
    reason = "CUDA error: operation not permitted"
    assert said == [
        f"--cuda-graphs: a step cannot be captured ({reason}); training goes on without"
    ]
    assert cuda.captures == fails + 1


@pytest.mark.parametrize("tidy", [False, True])
@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_capture_that_fails_leaves_stream_memory_and_generator_as_they_were(
    fails, tidy, monkeypatch
):
    """torch 2.15 sees to them, 2.11 does not. Those captured before, of the same update, are gone, too."""
    cuda = FakeCuda(monkeypatch, fail_at=[fails], tidy=tidy)
    trainer = _trainer(_model(), amp=torch.float16, accumulate=3, cuda_graphs=True)
    _train(trainer, _batches(3 * UPDATES), evaluates=False)
    assert cuda.captures == fails + 1
    assert cuda.current is cuda.before
    assert not cuda.generator.capturing
    assert not cuda.allocating
    assert len(cuda.pools) == fails  # of the graphs before
    assert not trainer.graphs._captured


def test_what_a_failed_capture_allocated_is_free_before_the_training_goes_on(monkeypatch):
    """Without a collection of garbage, which may come late: the eager step needs as much memory again."""
    FakeCuda(monkeypatch, fail_at=[0])
    made, left = [], []

    def say(_line):
        left.extend(ref for ref in made if ref() is not None)

    trainer = _trainer(_model(), cuda_graphs=True, say=say)

    def note(_module, _inputs, terms):
        made.append(weakref.ref(terms["total"]))

    trainer.objective.register_forward_hook(note)
    gc.disable()
    try:
        _train(trainer, _batches(WARM_UP + 1), evaluates=False)
    finally:
        gc.enable()
    assert len(made) == WARM_UP + 2
    assert not left


def test_an_update_after_a_capture_that_failed_in_the_optimizer_unscales_gradients_once(
    monkeypatch,
):
    """A scaler hands its scale to the optimizer as an attribute, and multiplies by what it finds there."""
    FakeCuda(monkeypatch, fail_at=[0])
    batches, more = _batches(UPDATES), {"amp": torch.float16}
    whole = _train(_trainer(_model(), **more), batches, evaluates=False)
    trainer = _trainer(_model(), **more, cuda_graphs=True)
    _assert_same(_train(trainer, batches, evaluates=False), whole)


def test_a_step_that_reads_a_number_is_not_captured(monkeypatch):
    cuda, said = FakeCuda(monkeypatch), []
    trainer = _trainer(_model(), cuda_graphs=True, say=said.append)

    def read(_module, _inputs, output):
        output.sum().item()

    trainer.objective.model.network[1].register_forward_hook(read)
    _train(trainer, _batches(UPDATES))
    (line,) = said
    assert "not permitted" in line
    assert not cuda.graphs


def test_a_batch_of_another_length_is_computed_eagerly(monkeypatch):
    cuda, ends = FakeCuda(monkeypatch), []
    batches = _batches(UPDATES)
    batches[-2] = Batch(tuple(x[:3] for x in batches[-2].images), batches[-2].labels[:3])
    for cuda_graphs in (False, True):
        ends.append(_train(_trainer(_model(), cuda_graphs=cuda_graphs), batches))
    _assert_same(ends[1], ends[0])
    assert cuda.graphs[0].replays == UPDATES - WARM_UP - 1


def test_a_profile_measures_replays_alone(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    trainer = _trainer(_model(), cuda_graphs=True)
    captures = []
    watched = trainer.graphs.run

    def run(*given):
        captures.append(cuda.captures)
        return watched(*given)

    monkeypatch.setattr(trainer.graphs, "run", run)
    times = time_steps(trainer, trainer.objective.model, iter(_batches(20)), 2)
    assert list(times.parts) == ["data", "forward to optimizer", "optimizer"]
    assert captures[-2:] == [1, 1]  # captured before the steps that count


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"recompute": "norm"}, "--cuda-graphs and --recompute: choose one"),
        (
            {"sizes_per_step": 2},
            "--cuda-graphs: a graph has all sizes in it, not --sizes-per-step 2",
        ),
        ({"qw": 2}, "--cuda-graphs: not with the quantizers of --qw and --qa"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(given, line, tmp_path):
    with pytest.raises(UsageError, match=line):
        resolve(
            TrainConfig(data=tmp_path, cuda_graphs=True, **given),
            world_size=1,
            device_type="cuda",
            has_bf16=True,
        )


@pytest.mark.parametrize(
    ("device", "line"), [("cpu", "a CPU has none"), ("cuda", "supports a single process only")]
)
def test_where_there_can_be_no_graph_there_is_one_line(device, line, tmp_path, monkeypatch):
    """DDP is not known to work, not even with a single process."""
    config = resolve(
        TrainConfig(data=tmp_path, cuda_graphs=True),
        world_size=1,
        device_type=device,
        has_bf16=True,
    )
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(UsageError, match=f"--cuda-graphs: {line}"):
        require_trainable(config, torch.device(device))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def _on_gpu(arch, tmp_path, **more):
    config = TrainConfig(
        data=tmp_path, arch=arch, sizes=(64, 48, 32), batch_size=8, lr=0.01, clip_grad=1.0, ema=0.9,
        on_nonfinite=("skip", "3"), **more,
    )  # fmt: skip
    config = resolve(config, world_size=1, device_type="cuda", has_bf16=True)
    torch.manual_seed(0)
    model = create_model(ModelConfig(arch, 10, config.sizes)).to(GPU)
    said = []
    trainer = make_trainer(
        config, model.to(memory_format=torch.channels_last), 10, 10, GPU, said.append
    )
    return trainer, said


def _train_on_gpu(trainer, updates):
    trainer.objective.train()
    generator = torch.Generator(GPU).manual_seed(1)
    losses = []
    for step in range(updates * trainer.accumulate):
        images = tuple(
            torch.randn(8, 3, s, s, device=GPU, generator=generator) for s in (64, 48, 32)
        )
        labels = torch.randint(0, 10, (8,), device=GPU, generator=generator)
        last = (step + 1) % trainer.accumulate == 0
        losses.append(trainer.forward_backward(Batch(images, labels), last)["total"].clone())
        if last:
            trainer.update()
    return torch.stack(losses)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("arch", ["parallel_resnet18", "parallel_mobilenetv2"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_graphs_on_a_gpu_are_the_eager_training(amp, accumulate, arch, tmp_path):
    losses = []
    for cuda_graphs in (False, True):
        options = {"amp": amp, "accumulate": accumulate, "cuda_graphs": cuda_graphs}
        trainer, said = _on_gpu(arch, tmp_path, **options)
        losses.append(_train_on_gpu(trainer, 8))
        assert not said
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=1e-2)
    assert trainer.guard.state() == [0, 0]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.slow  # a compilation
def test_a_compiled_step_is_captured_on_a_gpu(tmp_path):
    trainer, said = _on_gpu("parallel_resnet18", tmp_path, compile=True, cuda_graphs=True)
    eager, _ = _on_gpu("parallel_resnet18", tmp_path)
    torch.testing.assert_close(
        _train_on_gpu(trainer, 6), _train_on_gpu(eager, 6), rtol=2e-2, atol=1e-2
    )
    assert not said


@pytest.mark.gpu
@needs_gpu
def test_no_replay_synchronises_on_a_gpu(tmp_path):
    trainer, said = _on_gpu("parallel_resnet18", tmp_path, amp="fp16", cuda_graphs=True)
    images = tuple(torch.randn(8, 3, s, s, device=GPU) for s in (64, 48, 32))
    batch = Batch(images, torch.arange(8, device=GPU))
    for step in range(WARM_UP + 4):
        torch.cuda.set_sync_debug_mode("error" if step > WARM_UP else "default")
        try:
            trainer.forward_backward(batch, last=True)
            trainer.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not said


@pytest.mark.gpu
@needs_gpu
def test_after_a_capture_that_cuda_broke_off_a_gpu_is_as_before(tmp_path):
    def read(_module, _inputs, output):
        output.sum().item()

    before, losses = torch.cuda.current_stream(), []
    for cuda_graphs in (False, True):
        trainer, said = _on_gpu("parallel_resnet18", tmp_path, amp="fp16", cuda_graphs=cuda_graphs)
        trainer.objective.model.network.conv1.register_forward_hook(read)
        losses.append(_train_on_gpu(trainer, WARM_UP + 4))
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=1e-2)
    (line,) = said
    assert "a step cannot be captured" in line
    assert torch.cuda.current_stream() == before
    assert (
        torch.rand(2, device=GPU).isfinite().all()
    )  # a generator that is captured still would raise
    torch.cuda.empty_cache()  # and so would an allocator in a capture

"""A training step for a GPU, also without one: then with tensors that have a device, but no numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.batch import Batch
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import resolve
from rsnet.config.train_config import TrainConfig
from rsnet.models.factory import create_model
from rsnet.training.trainer import make_trainer

SIZES = (48, 40, 32)
GPU = torch.device("cuda", 0)


def _trainer(model, arch, amp):
    """On fake memory of a GPU, with all that a step may do."""
    config = TrainConfig(
        data=Path(), arch=arch, sizes=SIZES, batch_size=2, amp=amp, clip_grad=1.0, ema=0.9,
        mixup=0.2, on_nonfinite=("skip", "3"), sizes_per_step=2,
    )  # fmt: skip
    config = resolve(config, world_size=1, device_type="cuda", has_bf16=True)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(p.shape, device=GPU)))
        for name, b in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(b.shape, dtype=b.dtype, device=GPU))
    return make_trainer(config, model, 10, 100, GPU)


class _FromTheHost(TorchDispatchMode):
    """Collects operations that give a GPU what lies in the host's memory, for which the host waits."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            {t.device.type for t in tree_leaves(x) if isinstance(t, torch.Tensor)}
            for x in ((args, kwargs), result)
        )
        if "cpu" in given and "cuda" in given | made:
            self.found.append(str(func))
        return result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by a copy
@pytest.mark.parametrize(
    ("arch", "amp"),
    [
        ("parallel_resnet10", "bf16"),
        ("parallel_mobilenetv2", "fp16"),
    ],
)
def test_a_step_reads_no_number_and_mixes_no_devices(arch, amp, monkeypatch):
    """Fake tensors raise for either. They have no backward without a GPU, and no fused SGD."""
    left_out = []

    def backward(loss):
        left_out.append(loss.device)
        for parameter in trainer.objective.parameters():
            parameter.grad = torch.empty_like(parameter)

    # Autocast and the loss scaler turn themselves off where there is no GPU.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_args, **_more: left_out.append("sgd"))
    model = create_model(ModelConfig(arch, 10, SIZES, width_mult=0.125))
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = _trainer(model, arch, amp)
        trainer.objective.train()
        for _ in range(2):
            images = tuple(torch.empty(2, 3, s, s, device=GPU) for s in SIZES)
            batch = Batch(images, torch.zeros(2, dtype=torch.int64, device=GPU))
            with _FromTheHost() as host:
                terms = trainer.forward_backward(batch, last=True)
                trainer.means.add(terms)
                trainer.update()
    assert {term.device for term in terms.values()} == {GPU}
    assert not host.found
    assert left_out == [GPU, "sgd"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_no_step_synchronises_on_a_gpu(amp):
    device = torch.device("cuda", 0)
    model = create_model(ModelConfig("parallel_mobilenetv2", 10, SIZES, width_mult=0.125)).to(
        device
    )
    config = TrainConfig(
        data=Path(), arch="parallel_mobilenetv2", sizes=SIZES, amp=amp, clip_grad=1.0
    )
    config = resolve(config, world_size=1, device_type="cuda", has_bf16=True)
    trainer = make_trainer(config, model, 10, 100, device)
    images = tuple(torch.randn(4, 3, s, s, device=device) for s in SIZES)
    batch = Batch(images, torch.arange(4, device=device))
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            trainer.forward_backward(batch, last=True)
            trainer.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")

"""CUDA graphs: which batches share one, and, on a GPU, that they compute what the network does."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from pipelines.utils.errors import UsageError
from rsnet.config.model_config import ModelConfig
from rsnet.inference.runner import CudaGraphRunner, ModelRunner, bucket
from rsnet.models.factory import create_model
from tests.helpers.cuda_graphs import FakeCuda

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_a_batch_is_padded_to_a_power_of_two_or_the_largest():
    counts = [1, 2, 3, 4, 5, 8, 9, 16, 17, 24]
    assert [bucket(n, 24) for n in counts] == [1, 2, 4, 4, 8, 8, 16, 16, 24, 24]


def test_each_size_and_bucket_is_captured_once_and_answers_for_its_images_alone(monkeypatch):
    FakeCuda(monkeypatch)
    graphs = CudaGraphRunner(lambda x, size: x.mean((2, 3)) * size, largest=6)
    sent = [torch.randn(n, 3, size, size) for n in (3, 4, 1, 5, 6, 2) for size in (8, 4)]
    answers = [graphs(x, x.shape[-1]) for x in sent]
    # Compared at the end: an answer that lies in a graph's memory would be the last one's by now.
    for x, answer in zip(sent, answers, strict=True):
        torch.testing.assert_close(answer, x.mean((2, 3)) * x.shape[-1])
    assert list(graphs._captured) == [(s, n) for n in (4, 1, 6, 2) for s in (8, 4)]


def test_a_forward_that_waits_for_the_device_is_refused_in_a_line(monkeypatch):
    FakeCuda(monkeypatch)
    graphs = CudaGraphRunner(lambda x, _size: x.nonzero(), largest=2)
    with pytest.raises(UsageError, match=r"cuda_graphs: a forward .* captured \(.*not permitted"):
        graphs(torch.ones(1, 3, 8, 8), 8)


@pytest.mark.parametrize("at_end", [False, True])
def test_a_capture_that_runs_out_of_memory_says_so(monkeypatch, at_end):
    """Also where the end of the capture fails, too, after the error of the forward."""

    @contextmanager
    def capture(*_, **__):
        try:
            yield
        finally:
            if at_end:
                raise RuntimeError("CUDA error: operation failed due to a previous error")

    def forward(x, _size):
        if forwards.pop():
            return x
        raise torch.OutOfMemoryError("CUDA out of memory.")

    FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    forwards = [False, True, True, True]  # the capture follows the warm-up
    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphRunner(forward, largest=2)(torch.ones(1, 3, 8, 8), 8)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("gpu", [pytest.param(True, marks=needs_gpu)])
def test_graphs_compute_what_the_network_does(fold, dtype, gpu):
    device = torch.device("cuda")
    model = (
        create_model(ModelConfig("parallel_resnet10", 5, (64, 32), width_mult=0.25))
        .eval()
        .to(device)
    )
    model = model.to(memory_format=torch.channels_last)
    eager, graphs = (
        ModelRunner(model, device, dtype, batch_size=6, fold=fold, cuda_graphs=on)
        for on in (False, gpu)
    )
    sent = [torch.randn(n, 3, s, s, device=device) for n in (3, 6, 1, 5, 3) for s in (64, 32)]
    with torch.inference_mode():
        answers = [graphs(x, x.shape[-1]) for x in sent]
        for x, answer in zip(sent, answers, strict=True):
            expected = eager(x, x.shape[-1])
            # Rounding of the largest logit to bfloat16 alone is 0.4 % of it.
            off = 1e-2 if dtype is None else 3e-2
            assert (answer - expected).abs().max() <= off * expected.abs().max()


def test_weights_are_kept_in_the_precision_that_is_computed_in():
    model = create_model(
        ModelConfig("parallel_resnet10", 3, (32,), width_mult=0.125, stem="small")
    ).eval()
    ModelRunner(model, torch.device("cpu"), torch.bfloat16, 2, fold=False, cuda_graphs=False)
    assert model.network.conv1.weight.dtype == torch.bfloat16

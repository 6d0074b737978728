"""The kernel for GPUs, in Triton's interpreter, against PyTorch's operations."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from rsnet.models.quantization import encode
from tests.helpers.triton import compile_for_h100

pytest.importorskip("triton", reason="torch came without Triton")


# Read when Triton is imported, which other tests do without.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.slow  # a process that imports torch
@pytest.mark.skipif(INTERPRETED, reason="this is the process of its own")
def test_the_interpreters_tests_pass_in_a_process_of_their_own():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout


@pytest.mark.slow  # a compilation
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("counting", [False, True])
def test_the_kernel_compiles_for_a_gpu_without_one(counting, tmp_path, monkeypatch):
    """The interpreter takes what the compiler refuses, as annotations that are not Triton's."""
    kernel = importlib.import_module("rsnet.models.quantization.encode_triton")
    types = {"rows": "*bf16", "coded": "*bf16", "levels": "*bf16", "parts": "*fp64", "n": "i32"}
    constants = {"COUNT": 4, "COUNTING": counting, "BLOCK": kernel.BLOCK}
    assert compile_for_h100(kernel._encode, types, constants, tmp_path, monkeypatch)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no device")
def test_the_kernel_is_launched_on_the_device_of_the_values(monkeypatch):
    """Triton launches on the current device, whatever the tensors are on."""
    kernel = importlib.import_module("rsnet.models.quantization.encode_triton")
    current = []

    @contextmanager
    def device_of(values):
        current.append(values)
        yield
        current.pop()

    def launch(rows, *_, **__):
        assert current[-1] is rows

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kernel, "_encode", mock.MagicMock(__getitem__=lambda *_: launch))
    values = torch.randn(1, 8)
    levels = torch.arange(4.0)[None]
    kernel.encode(values, levels, levels, torch.empty_like(values), False)
    assert not current


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 in a process of its own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "n", "bits", "lowest"), [(3, 1500, 2, -1.0), (1, 2500, 4, 0.0)])
def test_every_value_gets_the_level_of_pytorchs_operations(dtype, rows, n, bits, lowest):
    """Blocks that are not full, values at a threshold, NaN and infinities; numbers and sums by level."""
    kernel = importlib.import_module("rsnet.models.quantization.encode_triton")
    basis = torch.rand(rows, bits) + 0.1
    thresholds, levels, _ = encode.level_table(basis, encode.code_table(bits, lowest))
    values = torch.randn(rows, n).to(dtype)
    values[0, :3] = torch.tensor([torch.nan, -torch.inf, torch.inf])
    values[:, 3] = thresholds[:, 1].to(dtype)
    found = torch.empty_like(values)
    above = kernel.encode(values, thresholds, levels, found, True)
    chosen = levels.gather(1, encode.level_indices(values, thresholds))
    expected = chosen.where(values > -torch.inf, values.float()).to(dtype)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    torch.testing.assert_close(above, encode._above(values, thresholds), rtol=1e-12, atol=0)
    assert kernel.encode(values, thresholds, levels, found, False) is None

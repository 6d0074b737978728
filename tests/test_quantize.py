"""The learned quantizers give the original's numbers, and follow plain descriptions of what they do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rsnet.bases import follow
from rsnet.models.quantize import (
    ActivationQuantizer,
    Quantizer,
    WeightQuantizer,
)
from tests import parity

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def _case(kind: str, bits: int) -> tuple[Quantizer, Tensor, dict[str, Tensor]]:
    """A quantizer, what the original's was given, and what the original's gave, laid out as ours."""
    numbers = {k: torch.tensor(v) for k, v in parity.numbers("lq")[f"{kind}/{bits}"].items()}
    if kind == "weight":
        quantizer: Quantizer = WeightQuantizer(bits, 5, 9)
        x = (parity.wave((3, 3, 4, 5), bits) * math.sqrt(2 / 45)).float().permute(3, 2, 0, 1)
        for name in ("y0", "grad0", "y3"):
            numbers[name] = numbers[name].reshape(3, 3, 4, 5).permute(3, 2, 0, 1)
    else:
        quantizer = ActivationQuantizer(bits)
        x = (1.5 * parity.wave((2, 6, 3, 3), 7 + bits).clamp(min=0)).float()
        for name in ("y0", "grad0", "y3"):
            numbers[name] = numbers[name].reshape(2, 6, 3, 3)
    numbers["init_basis"] = numbers["init_basis"].reshape(bits, -1).T
    numbers["basis_after"] = numbers["basis_after"].reshape(3, bits, -1).transpose(1, 2)
    return quantizer, x, numbers


@pytest.mark.parametrize("kind", ["weight", "activation"])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_outputs_gradients_and_three_updates_are_the_originals(kind, bits):
    quantizer, x, theirs = _case(kind, bits)
    torch.testing.assert_close(quantizer.basis, theirs["init_basis"], **TOLERANCE)
    x.requires_grad_()
    y = quantizer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, theirs["y0"], **TOLERANCE)
    torch.testing.assert_close(gradient, theirs["grad0"])
    for after in theirs["basis_after"]:
        quantizer(x)
        follow([quantizer], [quantizer.statistics.pop(0)])
        torch.testing.assert_close(quantizer.basis, after, **TOLERANCE)
    torch.testing.assert_close(quantizer(x), theirs["y3"], **TOLERANCE)

"""Temperatures against a plain scan, and the calibration error against a loop over bins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rsnet.inference import calibration as temperature


def _labelled(true: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose classes are drawn with these probabilities after division by `true`."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 6, generator=generator)
    labels = torch.multinomial((logits / true).softmax(1), 1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize("true", [0.5, 1.0, 4.0])
def test_the_temperature_is_that_of_the_least_cross_entropy(true):
    logits, labels = _labelled(true)

    def nll(t: float) -> float:
        z = logits.double().numpy() / t
        z = z - z.max(1, keepdims=True)
        return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels.numpy()]))

    found = temperature.fit(logits, labels)
    assert found == pytest.approx(min(np.arange(0.4, 5.0, 0.03), key=nll), abs=0.03)
    assert found == pytest.approx(true, rel=0.06)


@pytest.mark.parametrize(("sign", "limit"), [(1, 1 / temperature.LIMIT), (-1, temperature.LIMIT)])
def test_a_network_that_is_always_right_or_wrong_gets_a_finite_temperature(sign, limit):
    logits = sign * 2 * torch.eye(4)
    found = temperature.fit(logits, torch.arange(4))
    assert math.isfinite(found)
    assert found == pytest.approx(limit, rel=0.05) if sign < 0 else found < 0.3


def test_the_calibration_error_is_that_of_a_loop_over_the_bins():
    logits, labels = _labelled(2.0)
    for t in (1.0, 2.0):
        probabilities = (logits / t).softmax(1).numpy().astype(np.float64)
        best, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
        expected = 0.0
        for i in range(15):
            inside = (best >= i / 15) & (best < (i + 1) / 15)
            if inside.any():
                expected += inside.mean() * abs(right[inside].mean() - best[inside].mean())
        found = temperature.expected_calibration_error(logits, labels, t)
        assert found == pytest.approx(100 * expected, abs=1e-4)


def test_a_network_that_is_certain_and_wrong_is_off_by_100_percent():
    logits = 100 * torch.eye(3)
    assert temperature.expected_calibration_error(logits, torch.tensor([1, 2, 0])) == 100
    assert temperature.expected_calibration_error(logits, torch.tensor([0, 1, 2])) == 0

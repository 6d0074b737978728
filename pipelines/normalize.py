"""Normalisation of RGB bytes to the network's input."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.batch import Normalize

# Mean and standard deviation of RGB in 0..255. "unit" leaves [0, 1], which the original code trains on.
MEAN_STD: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "unit": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    # What some libraries' weights expect: timm's constants of these names.
    "inception": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "clip": ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
    "dpn": ((124.0, 117.0, 104.0), (1 / 0.0167, 1 / 0.0167, 1 / 0.0167)),
}


class PixelNormalizer:
    """Normalises RGB bytes in one kernel, without synchronising the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, normalize: Normalize) -> None:
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in MEAN_STD[normalize])
        self._scale = (1 / std).to(device, torch.float32)
        self._bias = (-mean / std).to(device, torch.float32)
        self._dtype = dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise (..., 3) uint8 on the device; return the same shape in the dtype, computed in float32."""
        out = torch.empty(pixels.shape, dtype=self._dtype, device=pixels.device)
        return torch.addcmul(self._bias, pixels, self._scale, out=out)


def byte_table(dtype: torch.dtype, normalize: Normalize) -> Tensor:
    """Return (3, 256): what each byte of each channel is normalised to."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None] for v in MEAN_STD[normalize])
    return ((torch.arange(256) - mean) / std).to(torch.float32).to(dtype)

"""Other libraries' loaders beside ours."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import peers
from pipelines.normalize import MEAN_STD
from tests.conftest import beton_of, needs_ffcv

SIZES = (32, 24)


def test_torchvisions_loader_gives_normalised_images_of_the_first_size(photos):
    o = peers.Options(photos, sizes=SIZES, batch_size=4, workers=0)
    batches = list(peers.torchvision_loader(o, torch.device("cpu"))(0))
    assert [len(labels) for _, labels in batches] == [4] * (23 // 4)
    pixels = torch.cat([images for images, _ in batches])
    assert pixels.shape[1:] == (3, 32, 32)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in MEAN_STD["imagenet"])
    bytes_again = pixels * std + mean
    assert bytes_again.min() > -0.01
    assert 200 < bytes_again.max() < 255.01


@pytest.mark.slow  # the compilation of FFCV's loader, and processes
@needs_ffcv
def test_all_loaders_read_the_same_photos(photos, capsys):
    o = peers.Options(photos, beton_of(photos), SIZES, batch_size=4, workers=1, rounds=3)
    assert peers.run(o) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    names = {"torchvision", "timm", "FFCV's own"}
    ours = {f"ours, {p}, {n}" for p in ("DALI", "FFCV") for n in ("1 size", "2 sizes")}
    assert found["images_per_s"].keys() == names | ours
    assert min(found["images_per_s"].values()) > 0
    ratio = found["speed_of_all_sizes_over_one_of"]["ours, DALI, 2 sizes / torchvision"]
    assert ratio["from"] <= ratio["median"] <= ratio["to"]

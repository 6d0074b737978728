"""Other libraries' loaders beside ours."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import peers
from pipelines.normalize import MEAN_STD
from tests.conftest import beton_of, needs_ffcv

SIZES = (32, 24)


def test_torchvisions_loader_gives_normalised_images_of_the_first_size(photos):
    o = peers.Options(photos, sizes=SIZES, batch_size=4, workers=0)
    batches = list(peers.torchvision_loader(o, torch.device("cpu"))(0))
    assert [len(labels) for _, labels, *_ in batches] == [4] * (23 // 4)
    pixels = torch.cat([images for images, _ in batches])
    assert pixels.shape[1:] == (3, 32, 32)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in MEAN_STD["imagenet"])
    bytes_again = pixels * std + mean
    assert bytes_again.min() > -0.01
    assert 200 < bytes_again.max() < 255.01


def test_the_cpu_time_of_workers_counts(monkeypatch):
    work = "import time; print(flush=True)\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    worker = subprocess.Popen(
        [sys.executable, "-S", "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [worker])
    assert worker.stdout is not None
    worker.stdout.readline()
    before = peers.cpu_seconds() - time.process_time()
    worker.stdout.readline()
    assert 0.15 < peers.cpu_seconds() - time.process_time() - before < 0.4
    worker.communicate(b"\n")


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
    assert found["cpu_ms_an_image"].keys() == names | ours
    ratio = found["speed_of_all_sizes_over_one_of"]["ours, DALI, 2 sizes / torchvision"]
    assert ratio["from"] <= ratio["median"] <= ratio["to"]

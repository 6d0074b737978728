"""Two processes by torchrun, over gloo: the same samples, the same weights, exact evaluation."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.helpers import processes

ROOT = processes.ROOT
# A run, and what it leaves: a thread of gloo may abort a Python that is ending.
RUN = """
import sys
from glob import glob
from pathlib import Path
from pipelines.dali import DaliOptions, make_loaders
from rsnet.train import main
code = main("train_dali.py", DaliOptions, make_loaders)
threads = [Path(path).read_text().strip() for path in glob("/proc/self/task/*/comm")]
assert not [name for name in threads if "gloo" in name], threads
sys.exit(code)
"""


@pytest.mark.slow  # half a minute; .ci/run has it
def test_two_processes_train_and_evaluate_every_image_once(photos, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)

    words = ["--data", photos, "--sizes", "32", "24", "16", "--workers", "1", "--amp", "off"]
    words += ["--arch", "parallel_resnet10", "--width-mult", "0.25", "--epochs", "1"]
    words += ["--wandb", "disabled"]
    two, evaluated = tmp_path / "two", tmp_path / "evaluated"
    # Sizes that sit out a step have no gradients to reduce; averaged weights are what is evaluated.
    # Quantizers' bases follow what both ranks see.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    options = ["--sizes-per-step", "2", "--ema", "0.5", "--recompute", "blocks", "--mode", "preact"]
    options += ["--qw", "2", "--qa", "2", "--checkpoint-every", "1", "--keep", "9", "-b", "4"]
    done = subprocess.run(
        [*map(str, (sys.executable, *launcher, *words, *options, "--output", two))],
        capture_output=True, text=True, timeout=300, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("python train_dali.py") == 1  # only one rank speaks
    metrics = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [2, 2]
    # 17 validation images: counted once, accuracies are multiples of 1/17.
    for name in ("32", "24", "16", "ensemble"):
        hits = metrics[-1][f"val/top1@{name}"] * 17 / 100
        assert abs(hits - round(hits)) < 1e-6
    # What was logged is what the saved file gives: statistics are rank 0's on all ranks.
    last = two / "checkpoints" / "last.pt"
    evaluate = ["--evaluate", "--resume", last, "-b", "8", "--output", evaluated]
    done = processes.run([sys.executable, ROOT / "train_dali.py", *words, *evaluate])
    assert done.returncode == 0, done.stderr
    results = json.loads((evaluated / "evaluation.json").read_text())
    for name in ("32", "24", "16", "ensemble"):
        assert abs(results[name]["loss"] - metrics[-1][f"val/loss@{name}"]) < 1e-3
    config = json.loads((two / "config.json").read_text())
    assert abs(config["lr"] - 0.1 * 8 / 256) < 1e-12
    content = torch.load(last, weights_only=True)
    assert not any(key.startswith("module.") for key in content["model"])
    *_, earliest = sorted((two / "checkpoints").glob("last-*.pt"))  # after the first update
    content = torch.load(earliest, weights_only=True)
    first, second = (rank["buffers"] for rank in content["ranks"])
    matrices = [i for i, buffer in enumerate(first) if buffer.ndim == 2]  # BatchNorm has none
    assert len(matrices) > 60
    assert all(torch.equal(first[i], second[i]) for i in matrices)
    assert not all(map(torch.equal, first, second))

"""train_ffcv.py as a user calls it: the same run as train_dali.py's, and one line when a file is broken."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from pipelines import dali, ffcv
from rsnet.train import main
from tests.conftest import beton_of, needs_ffcv
from tests.helpers.runs import NETWORK, write_run

pytestmark = needs_ffcv
RUN = [
    "--arch", "parallel_resnet18", "--width-mult", "0.125", "--sizes", "32", "24", "--workers", "1",
    "--batch-size", "8", "--epochs", "1", "--log-interval", "1", "--wandb", "disabled",
]  # fmt: skip


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """Run a command line in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(script, backend, options_type, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = main(script, options_type, backend.make_loaders)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def _metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_run_is_the_one_that_dali_gives(train, photos, tmp_path):
    """Same order, crops and labels; on a CPU the same pixels, else they differ by what the decoders do.

    With a teacher, which sees them at sizes of its own.
    """
    taught = write_run(tmp_path / "teacher", NETWORK | {"stem": "small", "sizes": [40, 24, 20]})
    run = [*RUN, "--teacher", taught, "--teacher-size", "ensemble"]
    assert train("train_dali.py", dali, dali.DaliOptions, "-d", photos, *run, "-c", "a")[0] == 0
    beton = beton_of(photos)
    code, _, _ = train("train_ffcv.py", ffcv, ffcv.FfcvOptions, "-d", beton, *run, "-c", "b")
    assert code == 0
    command = Path("b/command.txt").read_text()
    assert "python train_ffcv.py --data" in command
    assert "--os-cache --order random --no-trust" in command
    assert sorted(os.listdir("a")) == sorted(os.listdir("b"))
    for one, two in zip(_metrics(Path("a")), _metrics(Path("b")), strict=True):
        assert set(one) == set(two)
        if one.get("step") == 1 and "train/ce/32" in one:
            tolerance = 0.05 if torch.cuda.is_available() else 0
            for name in ("train/ce/32", "train/kd/teacher"):
                assert one[name] == pytest.approx(two[name], rel=0, abs=tolerance)


def test_a_finished_run_is_continued(train, photos):
    beton = beton_of(photos)
    arguments = ["train_ffcv.py", ffcv, ffcv.FfcvOptions, "-d", beton, *RUN, "-c", "run"]
    assert train(*arguments)[0] == 0
    code, _, err = train(*arguments, "--resume", "auto", "--epochs", "2")
    assert code == 0, err
    assert [m["epoch"] for m in _metrics(Path("run")) if "val/top1@32" in m] == [1, 2]


def test_a_broken_sample_ends_the_run_in_one_line(train, photos, tmp_path):
    beton = Path(shutil.copytree(beton_of(photos), tmp_path / "beton"))
    content = bytearray((beton / "train.beton").read_bytes())
    middle = (8_388_608 + len(content)) // 2
    content[middle : middle + 2000] = bytes(2000)
    (beton / "train.beton").write_bytes(content)
    code, _, err = train("train_ffcv.py", ffcv, ffcv.FfcvOptions, "-d", beton, *RUN, "-c", "run")
    assert code == 1
    (line,) = err.splitlines()
    assert "train_ffcv.py: error: " in line
    assert "is broken: Corrupt JPEG data: " in line

"""What the tests of faults share: runs in processes of their own, killed at will, with time limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.helpers import processes

ROOT = processes.ROOT
LIMIT_S = 120  # of one process; a hang is a failure

# 23 photos: 5 updates an epoch, with everything that has a state of its own.
RUN = [
    "--arch", "parallel_resnet10", "--width-mult", "0.25", "--stem", "small", "--sizes", "32", "24", "16",
    "-b", "4", "--epochs", "4", "--amp", "off", "--workers", "1", "--wandb", "disabled",
    "--log-interval", "2", "--ema", "0.9", "--mixup", "0.2", "--sizes-per-step", "2", "--device", "cpu",
]  # fmt: skip
UPDATES = 20


def command(data: Path, run: Path, *more: str | Path, script: str = "train_dali.py") -> list[str]:
    """A training that saves after every update unless `more` says otherwise."""
    words = [sys.executable, ROOT / script, "--data", data, "--output", run, *RUN]
    return [*map(str, words), "--checkpoint-every", "1", *map(str, more)]


def torchrun(ranks: int, words: Sequence[str], *more: str) -> list[str]:
    """`words`, a command that starts Python, by so many processes, which torchrun forks."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    launcher += [] if "--rdzv-endpoint" in more else ["--standalone"]
    launcher += ["--run-path", "--start-method", "fork"]
    return [words[0], *launcher, *more, *words[1:]]


def start(words: Sequence[str], more: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """In a session of its own, so that all its processes can be killed. `more`: of the environment."""
    return processes.start(
        words, {"PYTHONUNBUFFERED": "1", "UNDRAWN_PLOTS": "1"} | dict(more or {})
    )


def finish(words: Sequence[str], code: int | None = 0) -> tuple[str, str]:
    """Run to the end, with exit code `code` unless None; returns stdout and stderr."""
    return end(start(words), code)


def end(process: subprocess.Popen[str], code: int | None = 0) -> tuple[str, str]:
    """Wait for a process; kills its session at the limit, which is a failure."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert code is None or process.returncode == code, f"{process.returncode}\n{out}\n{err}"
    return out, err


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """Send a signal to all processes of a session."""
    os.killpg(process.pid, number)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until `condition()`; fails if the process ends or the time is over before."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            kill(process) if process.poll() is None else None
            raise AssertionError(f"it never came to that: {process.communicate()}")
        time.sleep(0.01)  # a condition that reads a file takes time from what is waited for


def metrics(run: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's metrics, without what depends on the machine's speed."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")}
        for line in whole
    ]


def step(run: Path) -> int:
    """The last one that was logged; 0 if none was."""
    lines = metrics(run)
    return int(lines[-1]["step"]) if lines else 0


def reached(run: Path, n: int) -> Callable[[], bool]:
    """Whether step `n` was logged, to wait for."""
    return lambda: step(run) >= n


def saved(run: Path, name: str = "last.pt") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / name, weights_only=True)
    return content


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested structures differ in a single bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for k in a for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)}"]
        return [
            d
            for i, pair in enumerate(zip(a, b, strict=True))
            for d in differences(*pair, f"{where}/{i}")
        ]
    return [] if a == b else [f"{where}: {a} and {b}"]


def assert_same_end(run: Path, whole: Path) -> None:
    """A run that was interrupted ended as one that was not: all state, and all metrics."""
    ended, expected = (
        {k: v for k, v in saved(r).items() if k not in ("config", "wandb_id")} for r in (run, whole)
    )
    assert differences(ended, expected) == []
    assert metrics(run) == metrics(whole)

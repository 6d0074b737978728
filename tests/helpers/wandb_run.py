"""Runs that log to W&B in a process of their own, to which something happens in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rsnet.loggers import wandb_logger as wandb_log
from rsnet.loggers.wandb_logger import WandbLogger
from tests.helpers import processes

ROOT = processes.ROOT
LIMIT_S = 120


def interrupted(kind: str, directory: Path, break_it: Callable[[int], None]) -> str:
    """Run `kind` ("log" or "train") and `break_it`, which gets the id of W&B's service, in the middle.

    Returns what the run said. Fails if the run goes on for two minutes.
    """
    said = directory.with_name("said.txt")
    with said.open("w") as file:  # a pipe would stay open for as long as a service that was stopped
        command = [sys.executable, "-m", "tests.helpers.wandb_run", kind, str(directory)]
        process = processes.start(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + LIMIT_S
        while not (directory / "paused").exists():
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)
        break_it(_service_of(process.pid))
        (directory / "go").touch()
        assert process.wait(LIMIT_S) == 0, said.read_text()
        return said.read_text()
    finally:
        process.kill()


def write_run(directory: Path, rows: list[dict[str, Any]]) -> None:
    """A run directory as a training leaves it, but for checkpoints."""
    directory.mkdir(exist_ok=True)
    config = {"batch_size": 8, "accumulate": 2, "wandb_project": "rsnet", "wandb_name": None}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "env.json").write_text('{"world_size": 3}')
    append(directory, rows)


def append(directory: Path, rows: list[dict[str, Any]]) -> None:
    with (directory / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"time": 1.5e9 + row["step"], **row}) + "\n" for row in rows)


def rows(first: int, last: int) -> list[dict[str, Any]]:
    return [{"step": s, "epoch": s / 4, "train/total": 1 / s} for s in range(first, last + 1)]


def log(wandb: WandbLogger, directory: Path, some: list[dict[str, Any]]) -> None:
    """As a training does it."""
    for row in some:
        append(directory, [row])
        wandb.log(row)


def _service_of(pid: int) -> int:
    """The one process that another has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    (child,) = {int(c) for task in tasks for c in (task / "children").read_text().split()}
    return child


def _pause(directory: Path) -> None:
    (directory / "paused").touch()
    while not (directory / "go").exists():
        time.sleep(0.05)


def _log(directory: Path) -> None:
    """1000 lines before and after, of 2 kB: too much for the buffers to a service that has stopped."""
    wandb_log.SERVICE_TIMEOUT_S = 2
    write_run(directory, [])
    log_ = WandbLogger(
        None, directory, project="rsnet", name=None, config={"lr": 0.1}, run_id=None, say=print
    )
    long = {"long": "x" * 2000}
    log(log_, directory, [row | long for row in rows(1, 1000)])
    _pause(directory)
    log(log_, directory, [row | long for row in rows(1001, 2000)])
    log_.finish()
    print("finished")


def _train(directory: Path) -> None:
    """Two epochs of two steps."""
    from pipelines import synthetic  # torch takes seconds
    from rsnet import train as run

    class Loader(synthetic.SyntheticLoader):
        def set_epoch(self, epoch: int) -> None:
            super().set_epoch(epoch)
            if epoch == 1:
                _pause(directory)

    synthetic.SyntheticLoader = Loader  # type: ignore[misc]
    sys.argv = [
        "train_dali.py", "--data", ".", "--arch", "parallel_resnet10", "--width-mult", "0.125",
        "--sizes", "16", "8", "--stem", "small", "--epochs", "2", "--batch-size", "4", "--log-interval", "1",
        "--device", "cpu", "--output", str(directory),
        "--train-images", "8", "--val-images", "4", "--classes", "2",
    ]  # fmt: skip
    code = run.main("train_dali.py", synthetic.SyntheticOptions, synthetic.make_loaders)
    print("finished" if code == 0 else code)


if __name__ == "__main__":
    {"log": _log, "train": _train}[sys.argv[1]](Path(sys.argv[2]))

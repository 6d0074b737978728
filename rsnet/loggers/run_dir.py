"""The run directory: what was asked for, where it ran, one JSON line per logged step; and the console."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipelines.utils.atomic_io import write_json, write_whole
from pipelines.utils.errors import DataError, UsageError

PACKAGES = (
    "ffcv",
    "numpy",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "pillow",
    "timm",
    "torch",
    "torchvision",
    "wandb",
)


class RunDir:
    """A folder that belongs to one run. `active` is False on ranks that write nothing.

    Raises UsageError if the folder cannot be written, or holds a run that is not to be continued.
    """

    def __init__(self, path: Path, continues: bool, active: bool) -> None:
        self.path = path
        self.active = active
        self.on_error: Callable[[str], None] | None = None  # what to do instead of ending the run
        self.last = path / "checkpoints" / "last.pt"
        self.best = path / "checkpoints" / "best.pt"
        if not active:
            return
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            (path / "metrics.jsonl").touch()
        except OSError as error:
            raise UsageError(f"--output: cannot write to {path}: {error.strerror}") from error
        # A run that broke off before its first logged step left nothing to lose; an imported one has
        # checkpoints alone.
        held = self.last.exists() or self.best.exists()
        if (held or (path / "metrics.jsonl").stat().st_size > 0) and not continues:
            raise UsageError(
                f"--output: {path} holds a run already; continue it with --resume auto, "
                "or give another folder"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes' runs out of the folder, until the end of this process at the latest.

        Raises UsageError if another one has it.
        """
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"--output: a process that still runs trains in {self.path}; wait for it, stop it, or "
                    "give another folder"
                ) from None
            except OSError:  # a file system that knows no locks
                pass
            yield

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """A crash leaves the old file or the new one."""
        if self.active:
            write_json(self.path / name, content)

    def append_text(self, name: str, text: str) -> None:
        """Raises DataError, or says once what is the matter if the run is to go on without it."""
        if not self.active:
            return
        try:
            with (self.path / name).open("a") as file:
                file.write(text)
        except OSError as error:
            line = f"cannot write to {self.path / name}: {error.strerror}"
            if self.on_error is None:
                raise DataError(f"{line}; free some space and run the same command") from error
            self.on_error(line)

    def sync(self) -> None:
        """Wait until the metrics are on the disk."""
        if self.active:
            with (self.path / "metrics.jsonl").open("a") as file:
                os.fsync(file.fileno())

    def rewind(self, done: float, epochs: int) -> None:
        """Move the metrics of what comes after `done` epochs, and of evaluations after `epochs` of them,
        which will be logged again, to metrics.abandoned.jsonl. (Epochs, because another global batch
        counts other steps.)"""
        if not self.active:
            return
        path = self.path / "metrics.jsonl"
        kept: list[str] = []
        abandoned: list[str] = []
        for line in path.read_text().splitlines(keepends=True):
            (kept if _is_kept(line, done, epochs) else abandoned).append(line)
        if abandoned:
            self.append_text("metrics.abandoned.jsonl", "".join(abandoned))
            write_whole(path, "".join(kept).encode())

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self.append_text("metrics.jsonl", json.dumps({"time": time.time(), **metrics}) + "\n")


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What a run's figures depend on besides its options."""
    is_cuda = device.type == "cuda"
    return {
        "git_sha": _git_sha(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "cuda": torch.version.cuda if is_cuda else None,
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or "cpu",
        "cpus": len(os.sched_getaffinity(0)),
        "world_size": world_size,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


class Display:
    """Progress on a terminal as a bar, elsewhere as plain lines; silent if not `active`."""

    def __init__(self, active: bool) -> None:
        self._active = active
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = 0.0
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._active:
            self._console.print(text, markup=False)

    def start(self, title: str, total: int) -> None:
        """Begin a phase of `total` units."""
        self.stop()
        self._title, self._total = title, total
        self._started = self._last_line = time.perf_counter()
        if self._active and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[info]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, info="")
            self._bar.start()

    def update(self, done: int, info: str, every: float = 0.0) -> None:
        """`done` of the units are finished; with `every`, a plain line each so many seconds."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, info=info)
            return
        now = time.perf_counter()
        if every and (now - self._last_line < every or done == self._total):
            return
        self._last_line = now
        left = (now - self._started) / done * (self._total - done)
        self.say(
            "  ".join(
                filter(
                    None, (f"{self._title} {done}/{self._total}", info, f"eta {_duration(left)}")
                )
            )
        )

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _is_kept(line: str, done: float, epochs: int) -> bool:
    """Whether a line of metrics is of that time; a line that a crash cut short is of none."""
    try:
        metrics = json.loads(line)
        is_evaluation = any(name.startswith("val/") for name in metrics)
        return bool(metrics["epoch"] <= (epochs if is_evaluation else done) + 1e-9)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _duration(seconds: float) -> str:
    minutes, secs = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{secs:02}"


def _git_sha() -> str | None:
    """The commit of this code, with "+" if it was changed since; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments), cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None

"""The run directory: what was asked for, where it ran, and one JSON line per logged step."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pipelines.utils.atomic_io import atomic_write, atomic_write_json, fsync
from pipelines.utils.errors import RunError, UsageError
from pipelines.utils.location import url_of
from pipelines.utils.locks import exclusive_lock
from pipelines.utils.schema import parsing
from pipelines.utils.text import first_names
from rsnet.checkpoint import io
from rsnet.checkpoint.checkpoint import Checkpoint

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


# Folders that may lie in a run's before its first checkpoint.
BESIDE_A_RUN = ("lost+found", "profile", "tensorboard", "wandb")

WRITTEN_WHOLE = ("config.json", "env.json", "command.txt", "results.json", "curves.png")


COMMANDS, TYPED = "command.txt", "# typed: "  # the file; how a line of it begins


def was_typed_last(folder: Path, typed: str) -> bool:
    """Return whether the run in `folder` was begun, or continued last, by the same command."""
    try:
        return is_last_typed((folder / COMMANDS).read_bytes(), typed)
    except OSError:
        return False


def is_last_typed(commands: bytes, typed: str) -> bool:
    """Return whether a command is the last one of the content of a command.txt."""
    lines = commands.decode(errors="surrogateescape").split("\n")
    return [line for line in lines if line.startswith(TYPED)][-1:] == [TYPED + typed]


def _others(path: Path) -> list[str]:
    """Return what makes a folder something else than a run's: other folders, releases, data.

    Logs of launchers, such as slurm-1.out, may lie in it.
    """
    found = []
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        is_known = entry.name in BESIDE_A_RUN or entry.name.startswith(".")
        if not is_known and (entry.is_dir() or entry.suffix in (".safetensors", ".beton", ".csv")):
            found.append(entry.name)
    return found


def _advice(error: OSError) -> str:
    """Return what to do about a file of a run that cannot be written."""
    if error.errno in (errno.ENOENT, errno.ESTALE):
        return "the run's folder is gone, or has another name: --output NAME --resume auto goes on from it"
    return "free some space and run the same command"


class RunDir:
    """A folder that belongs to one run. `active` is False on ranks that write nothing.

    Raises UsageError if the folder cannot be written, holds a run that is not to be continued, or files of
    others that would be written over: a release has a config.json, too.
    """

    def __init__(self, path: Path, continues: bool, active: bool) -> None:
        self.path = path
        self.active = active
        self.on_error: Callable[[str], None] | None = None  # what to do instead of ending the run
        self.last = path / "checkpoints" / "last.pt"
        self.best = path / "checkpoints" / "best.pt"
        if not active:
            return
        begun = (path / "checkpoints").is_dir() or (path / "metrics.jsonl").exists()
        if not begun and (others := [name for name in WRITTEN_WHOLE if (path / name).exists()]):
            raise UsageError(
                f"--output: {path} holds no run, but {first_names(others)}; give another folder"
            )
        if not begun and (others := _others(path)):
            raise UsageError(
                f"--output: {path} holds other files ({first_names(others)}); name a folder of the run's "
                f"own, such as {path / 'run'}"
            )
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
        """Lock the folder against other processes for the block, at most until this process ends.

        Raises UsageError if another one has it.
        """
        taken = (
            f"--output: a process that still runs trains in {self.path}; wait for it, stop it, or "
            "give another folder"
        )
        with exclusive_lock(self.path / "lock", taken):
            yield

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a file whole: a crash leaves the old one or the new one."""
        if self.active:
            atomic_write_json(self.path / name, content)

    def append_text(self, name: str, text: str) -> None:
        """Append to a file, a path with its bytes.

        Raises RunError if it cannot, or calls `on_error` if the run is to continue.
        """
        if not self.active:
            return
        before = None
        try:
            with (self.path / name).open("a", encoding="utf-8", errors="surrogateescape") as file:
                before = file.tell()
                file.write(text)
        except OSError as error:
            if before is not None:  # what was written of it would be in the way of what follows
                with suppress(OSError):
                    os.truncate(self.path / name, before)
            line = f"cannot write to {self.path / name}: {error.strerror}"
            if self.on_error is None:
                raise RunError(f"{line}; {_advice(error)}") from error
            self.on_error(line)

    def note(self, text: str) -> None:
        """Append a message with the time to log.txt, which is for people to read: a failed write is
        ignored. Other processes' errors are noted there, too.
        """
        with (
            suppress(OSError),
            (self.path / "log.txt").open("a", errors="backslashreplace") as file,
        ):
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def sync(self) -> None:
        """Wait until the metrics are on the disk."""
        if self.active:
            with (self.path / "metrics.jsonl").open("a") as file:
                fsync(file.fileno(), self.path / "metrics.jsonl")

    def rewind(self, done: float, epochs: int) -> None:
        """Move the metrics of what comes after `done` epochs, and of evaluations after `epochs` of them,
        which will be logged again, to metrics.abandoned.jsonl. (Epochs, because another global batch
        counts other steps.)"""
        if not self.active:
            return
        path = self.path / "metrics.jsonl"
        kept: list[bytes] = []
        abandoned: list[bytes] = []
        for line in path.read_bytes().splitlines(keepends=True):
            (kept if _is_kept(line, done, epochs) else abandoned).append(line)
        if abandoned:
            text = b"".join(abandoned).decode(errors="replace")
            self.append_text("metrics.abandoned.jsonl", text)
            self._note_that_wandb_has_others()
            atomic_write(path, b"".join(kept))

    def _note_that_wandb_has_others(self) -> None:
        """Let W&B's run count as one without the lines of before: it may have those that are abandoned."""
        path = self.path / "wandb.json"
        with suppress(
            FileNotFoundError, ValueError, TypeError
        ):  # a damaged one is said where it is read
            self.write_json("wandb.json", json.loads(path.read_bytes()) | {"lines": 0})

    def set_aside(self, name: str) -> None:
        """Rename a file of an earlier end of the run, if there is one: NAME.earlier."""
        if self.active:
            with suppress(FileNotFoundError):
                (self.path / name).replace(self.path / f"{name}.earlier")

    def append_metrics(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Append one line to metrics.jsonl; return it, with its time."""
        line = {"time": time.time(), **metrics}
        self.append_text("metrics.jsonl", json.dumps(line) + "\n")
        return line


def whole_metrics(path: Path, remedy: str) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, none if there is no file.

    A line without an end is left out: it is still being written, or was cut short by a crash. Raises
    DataError, with `remedy`, if another is damaged.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    with parsing(path, remedy):
        return [json.loads(line) for line in lines if line.endswith(b"\n")]


def run_directory(path: Path) -> Path:
    """Return the run directory that an argument names: it, its folder of checkpoints, or one of those.

    Raises UsageError for a release, a file that lies in no run, or a run in object storage.
    """
    if url := url_of(path):
        raise UsageError(f"{url}: this command reads runs of this machine alone: download it first")
    if (path / "model.safetensors").is_file() and not (path / "metrics.jsonl").exists():
        raise UsageError(f"{path} is a release, without the metrics of its training; give its run")
    if path.is_file():
        folder = path.resolve().parent
        if folder.name != "checkpoints":
            raise UsageError(f"{path} lies in no run, whose metrics are needed; give the directory")
        return folder.parent
    is_inner = path.name == "checkpoints" and (path.parent / "metrics.jsonl").exists()
    return path.parent if is_inner else path


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return what a run's figures depend on besides its options."""
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


def _is_kept(line: bytes, done: float, epochs: int) -> bool:
    """Return whether a line of metrics is of that time; a line that a crash cut short is of none."""
    try:
        metrics = json.loads(line)
        is_evaluation = any(name.startswith("val/") for name in metrics)
        return bool(metrics["epoch"] <= (epochs if is_evaluation else done) + 1e-9)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_sha() -> str | None:
    """Return the commit of this code, with "+" if it was changed since; None outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments), cwd=here.parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", here.name
        )  # fails if installed within another repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_imported_run(output: Path, original: Path, checkpoint: Checkpoint) -> Path:
    """Make a run directory that holds `checkpoint` as its last and best one; return the path of the best."""
    run_dir = RunDir(output, continues=False, active=True)
    for path in (run_dir.last, run_dir.best):
        io.save(path, checkpoint)
    run_dir.write_json("config.json", {"imported": str(original), **checkpoint.network.to_dict()})
    return run_dir.best

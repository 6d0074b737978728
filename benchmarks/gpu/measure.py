"""Measure everything of interest on a GPU, most important first, until the time is up.

    python -m benchmarks.gpu.measure --data /imagenet --output measured --seconds 600
    python -m benchmarks.gpu.measure --data /imagenet --output measured --parts step:resnet18:64 sweep

Writes measured/results.md: date, GPU, driver, commit and command, then each part's command and what it
printed. Profiles and their traces lie beside it. Each part is a process of its own, which is ended when its
time or the whole time is over; what it printed until then is kept. Exit code 1 if a part failed. The parts:

- smoke[:BATCH]: `benchmarks.gpu.smoke`, does everything run?
- sweep[:BATCH]: `benchmarks.gpu.loader_sweep`, DALI alone with other settings
- profile:ARCH:BATCH[:OPTION...]: `rsnet train --profile`, loader, computation and both, with these switches
- step:ARCH:BATCH: `benchmarks.throughput`, a step beside two other ways to write it, and peak memory
- ways:ARCH:BATCH: `benchmarks.step_ways`, CUDA graphs and the like
- evaluation:ARCH:BATCH: `benchmarks.evaluation`
- peers[:BATCH]: `benchmarks.peers`, DALI beside other libraries' loaders
- quantized, tests: `benchmarks.quantized`, and the tests that need a GPU
"""

from __future__ import annotations

import inspect
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.opened import require_photos
from benchmarks.options import command
from benchmarks.throughput import device_in_use
from pipelines.utils.cores import default_workers
from pipelines.utils.errors import UsageError
from rsnet.loggers.run_dir import environment

LEAST = 20.0  # seconds for which a part is worth beginning
PATIENCE = 5.0  # seconds, with a part that is asked to end

PARTS = (
    "smoke", "sweep", "profile:resnet50:128", "step:resnet50:128", "profile:resnet18:256",
    "profile:mobilenetv2:256", "ways:resnet50:128", "step:resnet18:128", "step:mobilenetv2:128",
    "profile:resnet50:256", "profile:resnet18:256:compile", "profile:resnet50:128:compile",
    "evaluation:resnet50:128", "peers", "quantized", "tests",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    data: Path
    """Folder with train/ and val/."""

    output: Path
    """New folder for what is measured."""

    parts: tuple[str, ...] = PARTS
    """In this order."""

    seconds: float = 600.0
    """For all of them."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Input sizes."""

    rounds: int = 15
    """Steps of each way that is compared; an evaluation has eight times as many batches."""

    workers: int = field(default_factory=default_workers)
    """DALI's threads."""


def smoke(o: Options, batch: str = "64") -> list[str]:
    words = ["--output", str(o.output / "smoke"), "--batch-size", batch]
    return ["benchmarks.gpu.smoke", *words, *_reading(o), *_sizes(o)]


def sweep(o: Options, batch: str = "256") -> list[str]:
    return ["benchmarks.gpu.loader_sweep", "--batch-size", batch, *_reading(o), *_sizes(o)]


def profile(o: Options, arch: str, batch: str, *switches: str) -> list[str]:
    output = o.output / "-".join(("profile", arch, batch, *switches))
    return [
        "rsnet", "train", "--profile", "--arch", f"parallel_{arch}", "--batch-size", batch, *_reading(o),
        *_sizes(o), "--profile-steps", str(2 * o.rounds), "--wandb", "disabled", "--output", str(output),
        *(f"--{switch}" for switch in switches),
    ]  # fmt: skip


def step(o: Options, arch: str, batch: str) -> list[str]:
    return [*_compared("throughput", o, arch, batch), "--curve", str(o.rounds)]


def ways(o: Options, arch: str, batch: str) -> list[str]:
    words = ["--ways", "graph", "cuda graphs", "recompute norm"]
    return [*_compared("step_ways", o, arch, batch), *words]


def evaluation(o: Options, arch: str, batch: str) -> list[str]:
    # So many batches that the folding of BatchNorm, once an evaluation, weighs as little as in a real one.
    few = replace(o, rounds=4)
    return [*_compared("evaluation", few, arch, batch), "--batches", str(8 * o.rounds)]


def quantized(o: Options) -> list[str]:
    return ["benchmarks.quantized", *_sizes(o), "--batch-size", "64", "--rounds", str(o.rounds)]


def peers(o: Options, batch: str = "128") -> list[str]:
    words = ["--batch-size", batch, "--rounds", "4"]
    return ["benchmarks.peers", *words, *_reading(o), *_sizes(o)]


def tests(_o: Options) -> list[str]:
    # Warnings are errors to those who write the code, not to who looks whether it runs with other libraries.
    lenient = "-W", "default", "--continue-on-collection-errors"
    return ["pytest", "-q", "-m", "gpu", *lenient, "--show-capture=no"]


def _compared(module: str, o: Options, arch: str, batch: str) -> list[str]:
    words = ["--arch", f"parallel_{arch}", "--batch-size", batch, *_sizes(o)]
    return [f"benchmarks.{module}", *words, "--rounds", str(o.rounds)]


def _reading(o: Options) -> list[str]:
    return ["--data", str(o.data), "--workers", str(o.workers)]


def _sizes(o: Options) -> list[str]:
    return ["--sizes", *map(str, o.sizes)]


# By the kind of a part: the most seconds that it may take, and its words after `python -m`.
KINDS: dict[str, tuple[float, Callable[..., list[str]]]] = {
    "smoke": (240, smoke),
    "sweep": (90, sweep),
    "profile": (300, profile),
    "step": (300, step),
    "ways": (150, ways),
    "evaluation": (120, evaluation),
    "quantized": (120, quantized),
    "peers": (120, peers),
    "tests": (300, tests),
}


class Results:
    """The file that is written part by part, and where it was measured."""

    def __init__(self, o: Options) -> None:
        self._path = o.output / "results.md"
        device = device_in_use()
        found: dict[str, Any] = environment(device, 1)
        packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
        self.add(
            f"# Measured on {found['device']}\n\n"
            f"- date: {found['started']}\n- GPU: {gpu() or 'none'}\n- CPU cores: {found['cpus']}\n"
            f"- commit: {found['git_sha']}\n- {packages}, CUDA {found['cuda']}\n"
            f"- command: `{shlex.join(['python', '-m', 'benchmarks.gpu.measure', *sys.argv[1:]])}`\n"
        )

    def add(self, text: str) -> None:
        with self._path.open("a") as file:
            file.write(text)

    def add_part(self, part: str, words: Sequence[str], printed: str, end: str) -> None:
        self.add(f"\n## {part}\n\n```\n$ python -m {shlex.join(words)}\n{printed}{end}\n```\n")


def gpu() -> str:
    """Name, driver, memory, clock and temperature; empty without a GPU."""
    fields = "name,driver_version,memory.total,clocks.sm,temperature.gpu"
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        ).stdout.strip().replace("\n", "; ")  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""


def words_of(part: str, o: Options) -> tuple[float, list[str]]:
    """Return the time limit of a part in seconds, and its arguments after `python -m`. Raises UsageError
    for an unknown part.
    """
    kind, *about = part.split(":")
    if kind not in KINDS:
        raise UsageError(f"--parts {part}: there is no such part; one of {' '.join(KINDS)}")
    seconds, words = KINDS[kind]
    try:
        inspect.signature(words).bind(o, *about)
    except TypeError:
        form = ":".join([kind, *(n.upper() for n in list(inspect.signature(words).parameters)[1:])])
        raise UsageError(f"--parts {part}: is written as {form}") from None
    return seconds, words(o, *about)


def finish(words: Sequence[str], printed: Path, seconds: float) -> str:
    """Run a process and its children for at most a given time; return how it ended."""
    start = time.perf_counter()
    with printed.open("w") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s: out of time"
        finally:
            _end(process)
    return f"exit code {code}, {time.perf_counter() - start:.0f} s"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that runs. It may have started others: a launcher ends its own when it is asked to."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(o: Options) -> int:
    parts = [(part, *words_of(part, o)) for part in o.parts]
    require_photos(o.data)
    if o.output.exists():
        raise UsageError(
            f"--output {o.output}: there is such a file or folder already; name a new one"
        )
    o.output.mkdir(parents=True)
    deadline = time.perf_counter() + o.seconds
    results = Results(o)
    ends = []
    for part, most, words in parts:
        left = deadline - time.perf_counter()
        printed = o.output / "printed.txt"
        if left < LEAST:
            ends.append("not begun: out of time")
            printed.write_text("")
        else:
            print(f"== {part}", flush=True)
            ends.append(finish([sys.executable, "-m", *words], printed, min(most, left)))
        text = printed.read_text(errors="replace")
        printed.unlink()
        print(f"{text}== {part}: {ends[-1]}", flush=True)
        results.add_part(part, words, text, ends[-1])
    return 0 if all(end.startswith(("exit code 0", "not begun")) for end in ends) else 1


if __name__ == "__main__":
    sys.exit(command("gpu.measure", Options, run))

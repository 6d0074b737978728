"""Does everything run on this machine's GPU, and are the GPU's pictures the CPU's?

    python -m benchmarks.gpu.smoke --data /imagenet --output smoke

Takes a few minutes, of which the trainings see some 1,000 photos. Prints a line for each check, and at last
"smoke: all well", or the checks that failed, with exit code 1. Without a GPU the checks run on the CPU, where
they show that the script works. A failed compiler or DDP is no reason not to train: leave the option out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from benchmarks.gpu.opened import opened, require_photos
from benchmarks.options import command
from benchmarks.throughput import device_in_use
from pipelines.batch import Batch, Loader, Loaders, LoaderSpec
from pipelines.dali import DaliOptions
from pipelines.utils.cores import default_workers
from pipelines.utils.errors import UsageError
from rsnet.__main__ import main as rsnet

CPU = torch.device("cpu")
MAX_OFF = 3.0  # of 255, a picture's mean difference: decoders of JPEG may round, and no more
SAME_SUMS = 1e-3  # relative; a photo may go to another of the GPU's decoders each time
CLASSES, PHOTOS = 64, {"train": 16, "val": 4}  # of a class, for the trainings

Check = Literal[
    "pictures-cuda", "pictures-engine", "pictures-bf16", "pictures-val",
    "epochs", "late-reading", "augmentation", "train", "resume", "evaluate",
    "compile", "ddp",
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    data: Path
    """Folder with train/ and val/."""

    output: Path
    """New folder for the trainings."""

    checks: tuple[Check, ...] = get_args(Check)
    """Those to do."""

    arch: str = "parallel_resnet18"
    """Network of the trainings."""

    sizes: tuple[int, ...] = (224, 192, 160, 128, 96)
    """Input sizes."""

    batch_size: int = 64
    """Images a batch."""

    workers: int = field(default_factory=default_workers)
    """DALI's threads."""

    batches: int = 4
    """Whose pictures are compared."""


def pictures(o: Options, split: str, engine: float, dtype: torch.dtype = torch.float32) -> str:
    """The device's pictures beside those that DALI makes on the CPU, of the same crops.

    engine: share of the JPEGs that the GPU's JPEG engine decodes; CUDA kernels decode the others.
    """
    device, number = device_in_use(), len(o.sizes)
    worst, mean = torch.zeros(number), torch.zeros(number)
    with (
        loaders(o, device, dtype, engine) as fast,
        loaders(o, CPU) as exact,
    ):
        pairs = zip(getattr(fast, split), getattr(exact, split), strict=True)
        for count, (a, b) in enumerate(islice(pairs, o.batches), start=1):
            assert torch.equal(a.labels.cpu(), b.labels), "other labels"
            off = torch.stack(
                [difference(x, y, dtype) for x, y in zip(a.images, b.images, strict=True)]
            )
            worst = torch.maximum(worst, off.amax(1))
            mean += (off.mean(1) - mean) / count
    said = f"mean {rounded(mean)}, worst {rounded(worst)} of 255"
    assert worst.max() < MAX_OFF, said
    return said


def difference(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N,) mean absolute difference of each picture of (N, 3, s, s) from 0 to 1, of 255."""
    assert x.dtype == dtype, x.dtype
    assert x.is_contiguous(memory_format=torch.channels_last), "not channels-last"
    return 255 * (x.float().cpu() - y).abs().mean(dim=(1, 2, 3))


def epochs_and_resuming(o: Options) -> str:
    """Check that an epoch read after an abandoned one, and one resumed in the middle, equal that epoch read
    alone.
    """
    with loaders(o) as first, loaders(o) as second:
        train = train_of(first)
        train.set_epoch(1)
        alone = sums(islice(train, 2 * o.batches))
        train.set_epoch(0)
        next(iter(train))
        train.set_epoch(1)
        again = sums(islice(train, o.batches))
        other = train_of(second)
        other.load_state_dict(train.state_dict())
        again += sums(islice(other, o.batches))
    return f"{len(alone)} batches, {same(alone, again)}"


def late_reading(o: Options) -> str:
    """Check that a batch is intact when the device reads it late, with later batches already in progress."""
    # 1 GB, which 40 passes take an H100 some 30 ms to read and write: more than the loader takes a batch.
    shape = (16384, 16384) if device_in_use().type == "cuda" else (64, 4096)
    busy = torch.randn(shape, device=device_in_use())
    with loaders(o) as those:
        train = train_of(those)
        kept = []
        for batch in islice(train, 3 * o.batches):
            for _ in range(40):
                busy = busy.sin()
            kept.append(sum_of(batch))
            del batch
        late = [float(total) for total in kept]
        train.set_epoch(0)
        now = sums(islice(train, 3 * o.batches))
    return same(late, now)


def augmentation(o: Options) -> str:
    with loaders(o, auto_augment="rand") as those:
        return f"{len(list(islice(train_of(those), 2)))} batches"


def train(o: Options, *words: str) -> str:
    """`rsnet train` on some of the photos; returns its command."""
    options = training_options(o, *words)
    code = rsnet(options)
    assert code == 0, f"exit code {code}"
    return f"rsnet {' '.join(options)}"


def training_options(o: Options, *words: str) -> list[str]:
    return [
        "train", "--data", str(some_photos(o)), "--arch", o.arch, "--sizes", *map(str, o.sizes),
        "--batch-size", str(o.batch_size), "--workers", str(o.workers), "--wandb", "disabled",
        "--log-interval", "2", *words,
    ]  # fmt: skip


def some_photos(o: Options) -> Path:
    """Links to a few photos of each of the first classes."""
    folder = o.output / "photos"
    if folder.exists():
        return folder
    for split, count in PHOTOS.items():
        for name in sorted(p.name for p in os.scandir(o.data / split) if p.is_dir())[:CLASSES]:
            (folder / split / name).mkdir(parents=True)
            for photo in sorted((o.data / split / name).iterdir())[:count]:
                (folder / split / name / photo.name).symlink_to(photo.resolve())
    return folder


def compiler(_o: Options) -> str:
    """torch.compile, which needs a compiler of C on this machine, forward and backward."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() + 1).sum()

    x = torch.randn(1000, device=device_in_use(), requires_grad=True)
    torch.compile(function)(x).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.allclose(x.grad, x.cos(), atol=1e-5)
    return "same gradients"


def ddp(o: Options) -> str:
    """An epoch by torchrun, in one process."""
    options = training_options(o, "--epochs", "1", "--output", str(o.output / "ddp"))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "rsnet"]
    code = subprocess.run([sys.executable, *words, *options], check=False).returncode
    assert code == 0, f"exit code {code}"
    return f"torchrun {' '.join(words[2:])} {' '.join(options)}"


def loaders(
    o: Options,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    engine: float = 0.65,
    **more: Any,
) -> AbstractContextManager[Loaders]:
    """By default on the device."""
    spec = LoaderSpec(
        o.data, o.sizes, o.batch_size, device or device_in_use(), dtype, "unit", **more
    )
    return opened(spec, DaliOptions(workers=o.workers, decoder_hw_load=engine))


def train_of(loaders: Loaders) -> Loader:
    assert loaders.train is not None
    return loaders.train


def sum_of(batch: Batch) -> torch.Tensor:
    """Return the sum on the device, without synchronising."""
    return torch.stack([x.sum(dtype=torch.float64) for x in batch.images]).sum()


def sums(batches: Iterable[Batch]) -> list[float]:
    return [float(sum_of(batch)) for batch in batches]


def same(xs: list[float], ys: list[float]) -> str:
    off = max(abs(x - y) / abs(x) for x, y in zip(xs, ys, strict=True))
    assert off < SAME_SUMS, f"relative difference {off:.1e}"
    return f"relative difference {off:.1e}"


def rounded(values: torch.Tensor) -> list[float]:
    return [round(v, 2) for v in values.tolist()]


ACTIONS: dict[Check, Callable[[Options], str]] = {
    "pictures-cuda": lambda o: pictures(o, "train", 0.0),
    "pictures-engine": lambda o: pictures(o, "train", 1.0),
    "pictures-bf16": lambda o: pictures(o, "train", 0.65, torch.bfloat16),
    "pictures-val": lambda o: pictures(o, "val", 0.65),
    "epochs": epochs_and_resuming,
    "late-reading": late_reading,
    "augmentation": augmentation,
    "train": lambda o: train(o, "--epochs", "1", "--output", str(o.output / "run")),
    "resume": lambda o: train(
        o, "--epochs", "2", "--output", str(o.output / "run"), "--resume", "auto"
    ),
    "evaluate": lambda o: train(
        o, "--evaluate", "--resume", str(o.output / "run" / "checkpoints" / "best.pt")
    ),
    "compile": compiler,
    "ddp": ddp,
}


def run(o: Options) -> int:
    require_photos(o.data)
    if o.output.exists():
        raise UsageError(
            f"--output {o.output}: there is such a file or folder already; name a new one"
        )
    o.output.mkdir(parents=True)
    device = device_in_use()
    print(torch.__version__, torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    failed = []
    for name in o.checks:
        start = time.perf_counter()
        try:
            said = ACTIONS[name](o)
        except Exception as error:  # the others may do
            failed.append(name)
            said = f"FAILED: {type(error).__name__}: {str(error)[:600]}"
        print(f"{name}: {said} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"smoke: {'failed: ' + '; '.join(failed) if failed else 'all well'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(command("gpu.smoke", Options, run))

"""Make the files of this folder anew: `python make.py CHECKOUT OUTPUT`, about a minute on one core.

CHECKOUT is a working tree of commit 449f338 (version 0.1.0), whose environment runs this script; OUTPUT is a
folder that is not there yet. tests/test_compatibility.py says what later code has to make of the files.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path[0] = str(Path(__file__).resolve().parents[3])
from tests.helpers import written  # noqa: E402

QUANTIZED = {
    "weights": ["--qw", "2"],
    "preact": ["--mode", "preact", "--qw", "2", "--qa", "2", "--width-mult", "0.125"],
}
ONE_EPOCH = ("--ema", "0", "--epochs", "1")


def write_images(root: Path) -> None:
    """18 training and 12 validation PNGs of three classes, which differ by colour, of several shapes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for channel, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                height, width = 34 + 4 * i, 48 - 3 * i
                coarse = rng.integers(0, 150, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
                coarse[..., channel] += np.uint8(100)
                blocks = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(blocks).save(path, optimize=True)


def call(*words: str, code: int = 0) -> str:
    """What a command prints, if it ends with this exit code."""
    found, printed = written.run(Path(), *words)
    assert found == code, f"{words} ended with {found}"
    return printed


def stopped_run() -> None:
    """Train, and ask to stop, as a scheduler does, in the first update of the last epoch."""
    from pipelines.dali import DaliLoader

    set_epoch = DaliLoader.set_epoch

    def stop(loader: DaliLoader, epoch: int) -> None:
        set_epoch(loader, epoch)
        if epoch == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(DaliLoader, "set_epoch", stop):
        call(*written.RUN, code=128 + signal.SIGTERM)


def write_repetitive(path: Path) -> None:
    """Give every tensor of a checkpoint its own first 29 numbers over and over.

    The original code has no network that is small, but a file of such weights can be compressed.
    """
    from rsnet import checkpoint

    content = checkpoint.load(path)
    for value in content["model"].values():
        numbers = value.flatten()
        value.copy_(numbers[:29].repeat(len(numbers) // 29 + 1)[: len(numbers)].view(value.shape))
    checkpoint.save(path, content)


def write_files() -> None:
    """All files, in the current folder, which has the images and a link to the script."""
    stopped_run()
    shutil.copytree("run", "stopped")
    shutil.copy("run/checkpoints/best.pt", "best.pt")
    call("rsnet", "release", "run", "--output", "release")
    call(*written.RUN)
    call("rsnet", "calibrate", "--checkpoint", "best.pt", "--size", "28", "--data", "images",
         "--steps", "3", "--batch-size", "6", "--output", "calibrated.pt")  # fmt: skip
    call(*written.tune(Path()))
    call(*written.EXPORT)
    for name, words in QUANTIZED.items():
        call(*written.RUN, *words, *ONE_EPOCH, "--output", name)
        shutil.copy(f"{name}/checkpoints/best.pt", f"{name}.pt")
    call(*written.RUN, *written.ORIGINAL, *ONE_EPOCH, "--width-mult", "1", "--stem", "imagenet",
         "--normalize", "unit", "--output", "mobile")  # fmt: skip
    write_repetitive(Path("mobile/checkpoints/best.pt"))
    call("rsnet", "export", "mobile/checkpoints/best.pt", "--output", "original.pth.tar")


def expected() -> dict[str, object]:
    """What this commit makes of its files."""
    evaluations = {}
    for name, words in written.EVALUATED.items():
        call(*written.EVALUATE, "--resume", name, *words, "--output", "evaluated")
        evaluations[name] = json.loads(Path("evaluated/evaluation.json").read_text())
    return {
        "machine": written.machine(),
        "onnx": written.onnx_versions(),
        "evaluations": evaluations,
        "results": json.loads(Path("run/results.json").read_text()),
        "metrics": written.metrics(Path("run/metrics.jsonl")),
        "predictions": {
            words: written.predictions(call(*written.PREDICT, *words.split()))
            for words in written.PREDICTED
        },
        "logits": written.logits(Path("release")),
    }


def keep(output: Path) -> None:
    """Copy what the tests need from the current folder, all that holds weights compressed."""
    # last-1.pt is best.pt once more.
    ignored = shutil.ignore_patterns("last-1*", "lock", "latency-*")
    for source, target in {"stopped": "run", "release": "release", "onnx": "onnx"}.items():
        shutil.copytree(source, output / target, ignore=ignored)
    env = output / "run" / "env.json"
    env.write_text(json.dumps(json.loads(env.read_text()) | {"platform": "Linux"}, indent=2) + "\n")
    for name in ("calibrated.pt", "weights.pt", "preact.pt", "original.pth.tar"):
        shutil.copy(name, output)
    end = torch.load("run/checkpoints/last.pt", weights_only=True)
    weights = {f"{key}/{name}": v for key in ("model", "ema") for name, v in end[key].items()}
    save_file({name: v.contiguous() for name, v in weights.items()}, output / "run_end.safetensors")
    for end in (".pt", ".tar", "run_end.safetensors"):
        for path in list(output.rglob(f"*{end}")):
            path.with_name(path.name + ".xz").write_bytes(
                lzma.compress(path.read_bytes(), preset=9)
            )
            path.unlink()


def main(checkout: Path, output: Path) -> None:
    sys.path[0] = str(checkout)
    write_images(output / "images")
    with tempfile.TemporaryDirectory() as work, written.one_thread():
        os.chdir(work)
        Path("images").symlink_to(output / "images")
        Path("train_dali.py").symlink_to(checkout / "train_dali.py")
        write_files()
        content = expected()
        keep(output)
        os.chdir(output)
    Path("expected.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(*(Path(word).resolve() for word in sys.argv[1:]))

"""Fine-tune on your own image folder, from an ordinary network's weights or from an earlier run.

    python examples/fine_tune.py DATA WEIGHTS OUTPUT [OPTION...]

DATA      folder with DATA/train/CLASS/*.jpg and DATA/val/CLASS/*.jpg
WEIGHTS   "default" (torchvision's current ones, downloaded once), a name such as IMAGENET1K_V1, the file of a
          state dict (resnet18-f37072fd.pth), or a release of an earlier run, of the same or of other classes
OUTPUT    folder to write: the run and the release
OPTION    any option of `rsnet train`; it replaces the one below, e.g. --sizes 224 160 96 --epochs 10

Expected: a table of accuracy by resolution, and OUTPUT/release. Time and accuracy depend on DATA, and have
not been measured.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from rsnet.release import load

# A tenth of the usual learning rate and few epochs: the weights are good already.
OPTIONS = ["--arch", "parallel_resnet18", "--recipe", "modern", "--epochs", "5", "--lr", "0.01"]


def main(data: str, weights: str, output: str, *options: str) -> None:
    if (Path(weights) / "config.json").is_file():
        Path(output).mkdir(parents=True, exist_ok=True)
        state = ordinary_weights(weights)
        weights = f"{output}/pretrained.pth"
        torch.save(state, weights)
    run = f"{output}/run"
    # The last layer is a new one if DATA has another number of classes. Each resolution's BatchNorm starts as
    # a copy of the ordinary one.
    start = ["--data", data, "--pretrained", weights, "--output", run]
    call("train", *start, *OPTIONS, *options)
    call("release", run, "--output", f"{output}/release")


def ordinary_weights(release: str) -> dict[str, Tensor]:
    """Return a release's weights at its largest size, under the names of the ordinary network.

    `network.bn1.by_resolution.0.weight` becomes `bn1.weight`.
    """
    model = load(Path(release))
    state = model.network.state_dict()
    others = re.compile(r"\.by_resolution\.[1-9]")
    return {k.replace(".by_resolution.0", ""): v for k, v in state.items() if not others.search(k)}


def call(*words: str) -> None:
    """Run `rsnet` with these arguments; end with its exit code if it fails, after its message."""
    if code := subprocess.run([sys.executable, "-m", "rsnet", *words], check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

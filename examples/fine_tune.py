"""Fine-tune on your own image folder, from an ordinary network's weights or from an earlier run.

    python examples/fine_tune.py DATA WEIGHTS OUTPUT [OPTION...]

DATA      folder with DATA/train/CLASS/*.jpg and DATA/val/CLASS/*.jpg
WEIGHTS   "default" (torchvision's current ones, downloaded once), a name such as IMAGENET1K_V1, the file of a
          state dict (resnet18-f37072fd.pth), or a run, a checkpoint or a release of an earlier training, of
          the same or of other classes and sizes (of another network than a ResNet-18 with its --arch)
OUTPUT    folder to write: the run and the release
OPTION    any option of `rsnet train`; it replaces the one below, e.g. --sizes 224 160 96 --epochs 10

Expected: a table of accuracy by resolution, and OUTPUT/release. Time and accuracy depend on DATA, and have
not been measured.
"""

from __future__ import annotations

import subprocess
import sys

# A tenth of the usual learning rate and few epochs: the weights are good already.
OPTIONS = ["--arch", "parallel_resnet18", "--recipe", "short", "--epochs", "5", "--lr", "0.01"]


def main(data: str, weights: str, output: str, *options: str) -> None:
    run = f"{output}/run"
    # The classifier starts anew if DATA has other classes. Each resolution's BatchNorm starts as the ordinary
    # one, or as that of the same or the nearest size.
    start = ["--data", data, "--pretrained", weights, "--output", run]
    call("train", *start, *OPTIONS, *options)
    call("release", run, "--output", f"{output}/release")


def call(*words: str) -> None:
    """Run `rsnet` with these arguments; end with its exit code if it fails, after its message."""
    if code := subprocess.run([sys.executable, "-m", "rsnet", *words], check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""What a command costs before it begins: CPU seconds (user and system) of fresh interpreters.

    python -m benchmarks.startup

Each row is the least of several runs, in which modules are compiled and in the operating system's cache.
The last is of a program that has imported torch and torchvision: what loading a release and classifying
one image takes beyond these imports. `python -X importtime -m rsnet VERB --help` shows where the time of
a verb goes. Prints one JSON object per row.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.options import command
from pipelines.utils.errors import UsageError, error_context

WRITTEN = Path(__file__).parents[1] / "tests" / "data" / "written_by_0.1"

IMPORTS = "import torch, torchvision\n"
CLASSIFY = (
    "import time, pathlib\n"
    "start = time.process_time()\n"
    "import rsnet\n"
    "classifier = rsnet.SwitchableClassifier.load(pathlib.Path({release!r}), 'cpu')\n"
    "classifier.classify([{image!r}])\n"
    "print(time.process_time() - start)\n"
)


@dataclass(frozen=True)
class Options:
    release: Path = WRITTEN / "release"
    """Release that is loaded."""

    image: Path = WRITTEN / "images" / "val" / "ant" / "0.png"
    """Image that is classified."""

    runs: int = 5
    """Interpreters that are started for each row."""


def require_classifiable(release: Path, image: Path) -> None:
    """Raise UsageError or DataError early, rather than after a minute, if a row could not classify."""
    import rsnet

    if not image.is_file():
        raise UsageError(f"--image: there is no file {image}")
    with error_context("--release"):
        classifier = rsnet.SwitchableClassifier.load(release, "cpu")
    classifier.classify([image])


def cpu_seconds(words: list[str], runs: int) -> float:
    """Return the least user and system time of a few runs of Python with these arguments."""
    return min(_once(words) for _ in range(runs))


def _once(words: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def run(o: Options) -> int:
    require_classifiable(o.release, o.image)
    rows = {
        "python -c pass": ["-c", "pass"],
        "import rsnet": ["-c", "import rsnet"],
        "rsnet --help": ["-m", "rsnet", "--help"],
        "rsnet predict --help": ["-m", "rsnet", "predict", "--help"],
        "rsnet train --help": ["-m", "rsnet", "train", "--help"],
        "import torch, torchvision": ["-c", IMPORTS],
    }
    for name, words in rows.items():
        _print(name, cpu_seconds(words, o.runs))
    code = IMPORTS + CLASSIFY.format(release=str(o.release), image=str(o.image))
    printed = (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
        for _ in range(o.runs)
    )
    _print("load and classify one image, beyond these imports", min(map(float, printed)))
    return 0


def _print(what: str, seconds: float) -> None:
    print(json.dumps({"what": what, "cpu_s": round(seconds, 3)}), flush=True)


if __name__ == "__main__":
    sys.exit(command("startup", Options, run))

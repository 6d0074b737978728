"""Break the program on purpose, a line at a time, and see that tests notice: `python tests/mutations.py`.

Each break replaces a text that occurs exactly once in its file, in a copy of the working tree, and runs the
tests that hold the line, which pass in an unbroken tree (`make test`). Ends with 1 if a break survives, or if
its text is no longer there. Words after the command choose breaks by a part of their names.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CONTRACT = "tests/pipelines/test_pipeline_contract.py"


# Imported once, rather than by the tests of every break; nothing of this tree.
PRELOADED = ("torch", "torchvision", "nvidia.dali.fn", "matplotlib.pyplot", "wandb", "tyro")


class Mutation(NamedTuple):
    """A break: in `file`, `old` becomes `new`, which one of `tests` (words for pytest) has to see."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation(
        "accumulated gradients are added up, not averaged",
        "rsnet/training/trainer.py", '"] / self.accumulate', '"]',
        "tests/training/test_trainer.py -k accumulated",
    ),
    Mutation(
        "top-down distillation has another scale",
        "rsnet/losses.py", "2 / (len(sums) + 1)", "2 / len(sums)",
        "tests/test_losses.py",
    ),
    Mutation(
        "networks learn from the ensemble's loss",
        "rsnet/losses.py", "_stacked(logits).detach())", "_stacked(logits))",
        "tests/test_losses.py",
    ),
    Mutation(
        "teachers learn from their students",
        "rsnet/losses.py", "students.detach()", "students",
        "tests/test_losses.py",
    ),
    Mutation(
        "a size is given another size's BatchNorm",
        "rsnet/models/switchable.py", "index = self.sizes.index(size)\n",
        "index = self.sizes.index(size) - 1\n",
        "tests/models/test_switchable.py -k 'largest or sorted or resolution'",
    ),
    Mutation(
        "a resumed epoch goes on one batch too late",
        "pipelines/sampler.py", "self._step * self", "(self._step + 1) * self",
        f"{CONTRACT} -k continues",
    ),
    Mutation(
        "random numbers do not go on where they were",
        "rsnet/training/state.py", "torch.set_rng_state(", "(lambda *_: None)(",
        "tests/training/test_state.py",
    ),
    Mutation(
        "what was not logged yet is lost",
        "rsnet/training/state.py", "trainer.means.load(", "(lambda *_: None)(",
        "tests/training/test_state.py",
    ),
    Mutation(
        "all sizes are flipped alike",
        "pipelines/transforms.py", 'if flip == "shared"', "if flip",
        f"{CONTRACT} -k flip",
    ),
    Mutation(
        "crops are the same in every epoch",
        "pipelines/dali/loader.py", "draw_crops(spec, self._epoch, indices)", "draw_crops(spec, 0, indices)",
        "tests/pipelines/dali/test_loader.py",
    ),
    Mutation(
        "the order of the samples does not depend on the seed",
        "pipelines/sampler.py", "default_rng((self.seed, epoch)).perm", "default_rng((0, epoch)).perm",
        "tests/pipelines/test_sampler.py -k order",
    ),
    Mutation(
        "an evaluation counts a sample twice",
        "pipelines/sampler.py", "return range(first, last)", "return range(max(0, first - 1), last)",
        f"{CONTRACT} -k counts",
    ),
    Mutation(
        "a quantizer's thresholds are not in the middle",
        "rsnet/models/quantization/encode.py", "levels[:, :-1]) / 2,", "levels[:, :-1]) / 2.1,",
        "tests/models/quantization/test_lq_nets.py -k 'originals or level'",
    ),
    Mutation(
        "the moving average of weights forgets nearly all",
        "rsnet/training/optim.py", "1 - decay)", "decay)",
        "tests/training/test_ema.py",
    ),
    Mutation(
        "one update less may be left out than was asked for",
        "rsnet/training/nonfinite.py", "> self._most", ">= self._most",
        "tests/evaluation/test_metrics.py",
    ),
    Mutation(
        "a loss that is not finite changes the weights",
        "rsnet/training/trainer.py", ".found_inf = left_out", ".not_found = left_out",
        "tests/training/test_trainer.py -k finite",
    ),
)  # fmt: skip


def copy_tree(target: Path) -> None:
    """Copy the files that git tracks, or would, into the folder `target`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def outcome(mutation: Mutation, tree: Path) -> str:
    """Break `tree`, run the tests, and mend it: "found", or what is wrong."""
    path = tree / mutation.file
    source = path.read_text() if path.exists() else ""
    if (count := source.count(mutation.old)) != 1:
        return f"CANNOT BE APPLIED: {mutation.old!r} is {count} times in {mutation.file}"
    path.write_text(source.replace(mutation.old, mutation.new))
    with tempfile.TemporaryFile("w+") as said:
        code = run_tests(tree, mutation.tests, said)
        said.seek(0)
        output = said.read()
    path.write_text(source)
    # Of an error in collecting, or of no test at all, pytest has other codes.
    return {0: "SURVIVED", 1: "found"}.get(code, f"NO TEST RAN: {output[-2000:]}")


def run_tests(tree: Path, words: str, said: IO[str]) -> int:
    """Run pytest in `tree`, in a fork of this process; returns its exit code."""
    if (pid := os.fork()) == 0:
        os.chdir(tree)
        sys.path[0] = str(tree)
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *shlex.split(words)])
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(chosen: list[str]) -> int:
    outcomes = []
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        for mutation in MUTATIONS:
            if not chosen or any(word in mutation.name for word in chosen):
                outcomes.append(outcome(mutation, Path(folder)))
                print(f"{mutation.name}: {outcomes[-1]}", flush=True)
    return int(any(text != "found" for text in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

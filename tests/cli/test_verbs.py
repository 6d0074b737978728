"""All verbs: what reading their options imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = {"torch", "torchvision", "PIL", "numpy", "matplotlib", "wandb", "nvidia", "ffcv", "numba"}

CODE = """
import importlib, sys
from rsnet.__main__ import VERBS
for verb in VERBS.values():
    if verb.module.startswith("rsnet.cli.") and verb.options:  # the others train, verify or convert
        importlib.import_module(verb.module)
print(*{name.split(".")[0] for name in sys.modules})
importlib.import_module("rsnet.cli.train")  # which looks at images' formats
print(*{name.split(".")[0] for name in sys.modules})
"""


def test_the_options_of_no_verb_import_torch_or_other_heavy_libraries():
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", CODE]
    found = subprocess.run(words, cwd=root, check=True, capture_output=True, text=True).stdout
    some, with_train = (set(line.split()) for line in found.splitlines())
    assert "rsnet" in some
    assert some & HEAVY == set()
    assert with_train & HEAVY <= {"PIL", "numpy"}

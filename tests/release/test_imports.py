"""Releases are read and used by torch, torchvision, safetensors, numpy and pillow alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rsnet.__main__ import main
from tests.conftest import write_photo
from tests.helpers.runs import NETWORK, write_run

# Of `from_run` no release needs anything: it reads checkpoints.
CODE = """
import pickle, sys
for name in ("numba", "tyro", "rich", "wandb", "matplotlib", "nvidia.dali"):
    sys.modules[name] = None
import numpy, PIL.Image, safetensors.torch, torch, torchvision
before = {name.split(".")[0] for name in sys.modules}
import rsnet.inference.benchmark, rsnet.inference.benchmark_report, rsnet.inference.cascade_search
import rsnet.release
from rsnet.inference.classifier import SwitchableClassifier
loaded = {name.split(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
assert loaded <= {"rsnet", "pipelines"}, loaded
torch.load = pickle.load = pickle.loads = pickle.Unpickler = None
photo, *folders = sys.argv[1:]
for folder in folders:
    rsnet.release.load(folder)(torch.zeros(1, 3, 32, 32))
    SwitchableClassifier.load(folder).classify(photo, 32)
"""


@pytest.mark.slow
def test_using_a_release_imports_no_tool_of_training_and_unpickles_nothing(written, tmp_path):
    run, quantized = tmp_path / "run", tmp_path / "release"
    write_run(run, NETWORK | {"mode": "preact", "qw": 2, "qa": 2})
    assert main(["release", str(run), "--output", str(quantized)]) == 0
    write_photo(tmp_path / "a.jpg", 40, 50, seed=1)
    words = [sys.executable, "-c", CODE, tmp_path / "a.jpg", written, quantized]
    subprocess.run(words, cwd=Path(__file__).parents[2], check=True)

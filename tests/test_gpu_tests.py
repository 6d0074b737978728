"""The tests for a GPU are found on a machine that has little more than PyTorch and DALI."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = """
import sys
for name in (
    "boto3", "botocore", "fastapi", "httpx", "moto", "onnx", "playwright", "pydantic", "starlette", "timm",
    "uvicorn", "wandb", "webdataset",
):
    sys.modules[name] = None
"""


@pytest.mark.slow  # it imports all tests
def test_the_tests_for_a_gpu_are_collected_without_the_libraries_of_the_others(tmp_path):
    (tmp_path / "block.py").write_text(BLOCK)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "block", "-m", "gpu", "--collect-only", "tests"],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = set(re.findall(r"^(tests/\S+)\.py::", done.stdout, re.MULTILINE))
    marked = {
        str(path.relative_to(ROOT).with_suffix(""))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text() and path != Path(__file__)
    }
    # Those that share the parametrization of DALI's.
    assert found == marked | {"tests/pipelines/test_augmentation"}

"""What is installed: conda's file, the lock and pyproject.toml say the same."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


def _requirements() -> dict[str, str]:
    """{name: lower bound} of everything that pyproject.toml asks for, for training."""
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *PYPROJECT["dependency-groups"]["dev"]]
    for name, extra in project["optional-dependencies"].items():
        if name != "tensorflow":  # half a gigabyte, to read the original's checkpoints once
            lines += extra
    return dict(line.lower().split(">=") for line in lines)


def _pinned() -> dict[str, str]:
    (pip,) = (d["pip"] for d in CONDA["dependencies"] if isinstance(d, dict))
    return dict(line.split("==") for line in pip)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def test_conda_installs_all_that_pyproject_asks_for_and_no_more():
    assert set(_pinned()) == set(_requirements())


def test_conda_installs_the_locked_versions():
    locked: dict[str, set[str]] = {}
    for package in LOCK["package"]:
        locked.setdefault(package["name"], set()).add(package.get("version", ""))
    for name, version in _pinned().items():
        assert version in locked[name], name


def test_the_pinned_versions_are_in_the_allowed_range():
    for name, bound in _requirements().items():
        assert _numbers(_pinned()[name]) >= _numbers(bound), name


def test_the_supported_versions_are_the_promised_ones():
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"
    assert _requirements()["torch"] == "2.11"
    assert "nvidia-dali-cuda130" in _requirements()
    assert "python=3.11" in CONDA["dependencies"]


def test_ffcvs_build_tools_are_in_condas_file():
    assert {"compilers", "pkg-config", "opencv", "libjpeg-turbo"} <= {
        d for d in CONDA["dependencies"] if isinstance(d, str)
    }


def test_the_shell_script_parses():
    assert subprocess.run(["sh", "-n", ROOT / "install.sh"], check=False).returncode == 0

"""What is installed: conda's file, the lock and pyproject.toml say the same."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import yaml

from pipelines.utils import cli

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def _requirements() -> dict[str, str]:
    """{name: lower bound} of everything that pyproject.toml asks for, for training."""
    lines = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["dependency-groups"]["dev"]]
    for name, extra in EXTRAS.items():
        # TensorFlow: half a gigabyte, to read the original's checkpoints once. CUDA 12: another DALI.
        if name not in ("tensorflow", "cuda12"):
            lines += [line for line in extra if not line.startswith("rsnet-trainer[")]
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


def test_inference_needs_five_libraries():
    names = {line.split(">=")[0] for line in PYPROJECT["project"]["dependencies"]}
    assert names == {"numpy", "pillow", "safetensors", "torch", "torchvision"}


def test_the_extra_for_cuda_12_is_that_for_training_but_for_dali():
    other = [line.replace("cuda120", "cuda130") for line in EXTRAS["cuda12"]]
    assert other == EXTRAS["train"]


def test_every_library_that_may_be_missing_is_of_the_extra_that_is_advised():
    package = {"nvidia": "nvidia-dali-cuda130", "tensorflow": "tensorflow-cpu"}
    for library, extra in cli.EXTRAS.items():
        wanted = package.get(library, library.replace("_", "-"))
        assert wanted in {line.split(">=")[0] for line in EXTRAS[extra]}, library


def test_every_extra_but_ffcv_and_the_other_dali_is_in_all():
    (line,) = EXTRAS["all"]
    named = set(line.removeprefix("rsnet-trainer[").removesuffix("]").split(","))
    assert named == set(EXTRAS) - {"all", "cli", "cuda12", "ffcv"}


def test_ffcvs_build_tools_are_in_condas_file():
    assert {"compilers", "pkg-config", "opencv", "libjpeg-turbo"} <= {
        d for d in CONDA["dependencies"] if isinstance(d, str)
    }


def test_the_container_copies_what_there_is_and_compiles_ffcv_with_the_same_packages():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("COPY "):
            assert all((ROOT / name).exists() for name in line.split()[1:-1])
    (packages,) = re.findall(r'APT_PACKAGES="(.*)"', (ROOT / "install.sh").read_text())
    (installed,) = re.findall(r"--no-install-recommends(.*?)&&", text)
    assert set(installed.split()) == set(packages.split())
    (extras,) = re.findall(r"/opt/rsnet\[(.*)\]", text)
    assert set(extras.split(",")) <= set(EXTRAS)


def test_the_shell_script_parses():
    assert subprocess.run(["sh", "-n", ROOT / "install.sh"], check=False).returncode == 0

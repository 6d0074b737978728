"""What is installed: conda's file, the lock and pyproject.toml say the same."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from pipelines.utils import cli

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


EXTRAS = PYPROJECT["project"]["optional-dependencies"]

# Those that are promised.
PYTHONS = [
    f"3.{minor}"
    for minor in range(30)
    if SpecifierSet(PYPROJECT["project"]["requires-python"]).contains(f"3.{minor}")
]


def _requirements() -> dict[str, str]:
    """{name: lower bound} of everything that pyproject.toml asks for, for training."""
    lines = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["dependency-groups"]["dev"]]
    for name, extra in EXTRAS.items():
        # TensorFlow: half a gigabyte, to read the original's checkpoints once. CUDA 12: another DALI.
        if name not in ("tensorflow", "cuda12"):
            lines += [line for line in extra if not line.startswith("rsnet-trainer[")]
    return dict(re.sub(r"\[.*\]", "", line).lower().split(">=") for line in lines)


def _pinned() -> dict[str, str]:
    (pip,) = (d["pip"] for d in CONDA["dependencies"] if isinstance(d, dict))
    return dict(re.sub(r"\[.*\]", "", line).split("==") for line in pip)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def test_conda_installs_all_that_pyproject_asks_for_and_no_more():
    """FFCV, which is compiled, by a command of its own: where that fails, the rest is there."""
    assert set(_pinned()) == set(_requirements()) - {"ffcv"}
    (command,) = re.findall(r"pip install ffcv==(\S+)", (ROOT / "environment.yml").read_text())
    assert command in {p["version"] for p in LOCK["package"] if p["name"] == "ffcv"}
    assert f"pip install ffcv=={command}" in (ROOT / "docs" / "getting-started.md").read_text()


def test_conda_installs_the_locked_versions():
    locked: dict[str, set[str]] = {}
    for package in LOCK["package"]:
        locked.setdefault(package["name"], set()).add(package.get("version", ""))
    for name, version in _pinned().items():
        assert version in locked[name], name


def test_the_pinned_versions_are_in_the_allowed_range():
    requirements = _requirements()
    for name, version in _pinned().items():
        assert _numbers(version) >= _numbers(requirements[name]), name


def test_the_supported_versions_are_the_promised_ones():
    assert PYTHONS == ["3.11", "3.12", "3.13", "3.14"]
    assert "with Python 3.11 to 3.14" in (ROOT / "README.md").read_text()
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
    package = {"nvidia": "nvidia-dali-cuda130", "tensorflow": "tensorflow-cpu", "yaml": "pyyaml"}
    for library, extra in cli.EXTRAS.items():
        wanted = package.get(library, library.replace("_", "-"))
        assert wanted in {line.split(">=")[0] for line in EXTRAS[extra]}, library


def test_every_extra_but_ffcv_and_the_other_dali_is_in_all():
    (line,) = EXTRAS["all"]
    named = set(line.removeprefix("rsnet-trainer[").removesuffix("]").split(","))
    assert named == set(EXTRAS) - {"all", "cli", "cuda12", "ffcv"}


def test_ffcvs_build_tools_are_in_condas_file():
    """OpenCV below 5: what FFCV looks for is 4."""
    assert {"compilers", "pkg-config", "opencv<5", "libjpeg-turbo"} <= {
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
    extras = re.findall(r"/opt/rsnet\[(.*)\](.*)", text)
    assert {name for names, _ in extras for name in names.split(",")} <= set(EXTRAS)
    assert [names for names, rest in extras if "||" in rest] == ["ffcv"]  # which may fail


def _tags(python: str) -> set[Tag]:
    """Of the wheels for a Python on Linux."""
    version = tuple(int(n) for n in python.split("."))
    glibc = [f"manylinux_2_{n}_x86_64" for n in range(5, 40)]
    linux = [*glibc, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    name = f"cp{version[0]}{version[1]}"
    return {*cpython_tags(version, [name], linux), *compatible_tags(version, name, linux)}


def _locked_for(python: str) -> dict[tuple[str, str], dict]:
    """All packages of the lock, whatever the extra, that a Python gets on Linux."""
    environment = {
        "python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux",
        "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
        "implementation_name": "cpython", "platform_python_implementation": "CPython", "extra": "",
    }  # fmt: skip
    by_name: dict[str, list[dict]] = {}
    for package in LOCK["package"]:
        by_name.setdefault(package["name"], []).append(package)
    found: dict[tuple[str, str], dict] = {}
    todo = [{"name": "rsnet-trainer"}]
    while todo:
        wanted = todo.pop()
        # An extra's name may stand in a marker: all are taken.
        marker = re.sub(r"extra [!=]= '[^']*'", "os_name == 'posix'", wanted.get("marker", ""))
        if marker and not Marker(marker).evaluate(environment):
            continue
        for package in by_name[wanted["name"]]:
            key = package["name"], package.get("version", "")
            forks = package.get("resolution-markers", [])
            is_of_it = not forks or any(Marker(fork).evaluate(environment) for fork in forks)
            if key in found or not is_of_it or wanted.get("version", key[1]) != key[1]:
                continue
            found[key] = package
            groups = [package.get("optional-dependencies", {}), package.get("dev-dependencies", {})]
            todo += package.get("dependencies", [])
            todo += [one for group in groups for listed in group.values() for one in listed]
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_locked_package_has_a_wheel_for_each_python_that_is_promised(python):
    """But FFCV and two packages that it needs, which are built."""
    tags, packages = _tags(python), _locked_for(python)
    assert len(packages) > 100
    lacking = set()
    for (name, _), package in packages.items():
        files = [wheel["url"].rpartition("/")[2] for wheel in package.get("wheels", [])]
        if not any(parse_wheel_filename(file.replace("%2B", "+"))[3] & tags for file in files):
            lacking.add(name)
    assert lacking == {"rsnet-trainer", "ffcv", "assertpy", "fastargs"}


def _install(tmp_path: Path, modules: str, **fails: str) -> tuple[list[str], str]:
    """Run install.sh with a pkg-config that knows these modules; return uv's arguments, and what was said."""
    log, bin_ = tmp_path / "log", tmp_path / "bin"
    bin_.mkdir()
    programs = {
        "pkg-config": f'shift; for m; do case " {modules} " in *" $m "*) ;; *) exit 1;; esac; done',
        "uv": f'echo "$*" >> {log}; case "$* $FAILS" in *"ffcv yes"*) exit 1;; esac',
        "c++": "", "id": "echo 1000",
    }  # fmt: skip
    for name, text in programs.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_ / name).chmod(0o755)
    (bin_ / "dirname").symlink_to(shutil.which("dirname"))
    done = subprocess.run(
        ["/bin/sh", ROOT / "install.sh"], env={"PATH": str(bin_), **fails}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines(), done.stderr


def test_ffcv_is_installed_where_its_libraries_are(tmp_path):
    (with_ffcv,), said = _install(tmp_path, "opencv4 libturbojpeg")
    assert with_ffcv.endswith(" --extra ffcv")
    assert said == ""


def test_an_ffcv_that_cannot_be_built_leaves_the_rest_of_the_environment(tmp_path):
    (with_ffcv, without), said = _install(tmp_path, "opencv4 libturbojpeg", FAILS="yes")
    assert with_ffcv == f"{without} --extra ffcv"
    assert "FFCV cannot be built, for the reason above: going on without it" in said


def test_an_opencv_that_is_too_new_for_ffcv_is_said(tmp_path):
    (without,), said = _install(tmp_path, "opencv5 libturbojpeg")
    assert "ffcv" not in without
    assert "install: FFCV needs OpenCV 4, here is 5\n" in said


@pytest.mark.parametrize("script", ["scripts/test_oldest.sh", "scripts/slurm.sh"])
def test_a_shell_script_parses(script):
    assert subprocess.run(["bash", "-n", ROOT / script], check=False).returncode == 0


def test_the_oldest_versions_that_are_tested_are_the_promised_ones():
    """The script takes them from pyproject.toml, line by line."""
    text = (ROOT / "scripts" / "test_oldest.sh").read_text()
    (function,) = re.findall(r"^oldest\(\) .*?^}", text, re.DOTALL | re.MULTILINE)
    words = f"{function}\noldest torch; oldest torchvision"
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["torch==2.11.*", "torchvision==0.26.*"]

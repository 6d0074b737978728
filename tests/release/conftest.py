"""A run, its release, and copies of that to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rsnet.__main__ import main
from tests.helpers.runs import write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="session")
def written(run) -> Path:
    folder = run.with_name("release")
    assert main(["release", str(run), "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A release that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "release"))

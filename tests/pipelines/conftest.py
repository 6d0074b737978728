"""A folder to verify, and the command that does it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.__main__ import VERBS
from pipelines.utils.cli import verb_command
from tests.conftest import write_folder


@pytest.fixture(scope="session")
def _good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for split, seed in (("train", 1), ("val", 2)):
        write_folder(folder / split, {"ant": 20, "bee": 5}, seed)
    return folder


@pytest.fixture
def data(_good, tmp_path) -> Path:
    """Good images; what a test damages is only read by itself."""
    return Path(shutil.copytree(_good, tmp_path / "data", copy_function=shutil.copyfile))


@pytest.fixture
def run(capsys):
    """Run `python -m pipelines.folder verify` in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        words = ["verify", *map(str, arguments)]
        code = verb_command("pipelines.folder", VERBS, words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call

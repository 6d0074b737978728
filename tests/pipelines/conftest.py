"""A folder to verify, and the command that does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.__main__ import VERBS
from pipelines.utils.cli import verb_command
from tests.conftest import write_folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Good images; what a test damages is only read by itself."""
    for split, seed in (("train", 1), ("val", 2)):
        write_folder(tmp_path / "data" / split, {"ant": 20, "bee": 5}, seed)
    return tmp_path / "data"


@pytest.fixture
def run(capsys):
    """Run `python -m pipelines.folder verify` in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        words = ["verify", *map(str, arguments)]
        code = verb_command("pipelines.folder", VERBS, words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call

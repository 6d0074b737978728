"""A folder to verify, and the command that does it; what the tests of shards at URLs share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.__main__ import VERBS
from pipelines.sources.cache_options import CacheOptions
from pipelines.storage import errors, remote
from pipelines.utils.cli import verb_command
from tests.conftest import write_folder
from tests.pipelines.sources.conftest import source_of


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


@pytest.fixture
def no_long_waits(monkeypatch):
    """Failed requests are tried again at once, and stalled ones soon."""
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(errors, "STALL", 0.3)


@pytest.fixture
def cache(tmp_path) -> CacheOptions:
    return CacheOptions(cache=tmp_path / "cached", cache_size="1GB")


@pytest.fixture
def local(photos) -> Path:
    """The photos as shards in a folder."""
    return source_of("shards", photos)

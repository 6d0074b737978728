"""Compiled code that is kept on disk, and is not taken for that of other sources."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from pipelines.utils import compiled

SOURCE = """
from pipelines.utils.compiled import compiler
compile_ = compiler(__file__, {other!r})
@compile_
def twice(x):
    return 2 * x
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Import the module anew, as another process does; `other` is a file that its functions call."""
    monkeypatch.setattr(compiled._CONFIG, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    other = tmp_path / "other.py"
    path = tmp_path / "module.py"
    path.write_text(SOURCE.format(other=str(other)))

    def call(text: str) -> ModuleType:
        other.write_text(text)
        spec = importlib.util.spec_from_file_location("module", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return call


def _hits(module: ModuleType) -> int:
    assert module.twice(4) == 8
    return sum(module.twice.stats.cache_hits.values())


def test_the_next_process_compiles_nothing_unless_a_file_that_is_called_has_changed(load, tmp_path):
    assert [_hits(load("a = 1")), _hits(load("a = 1")), _hits(load("a = 2"))] == [0, 1, 0]
    assert len(list((tmp_path / "__pycache__").glob("numba-*"))) == 2


def test_code_is_kept_where_the_environment_says_or_at_home_or_not_at_all(
    load, tmp_path, monkeypatch
):
    is_writable = compiled._is_writable
    refused: list[Path] = [tmp_path / "__pycache__"]
    monkeypatch.setattr(
        compiled,
        "_is_writable",
        lambda folder: folder.parent not in refused and is_writable(folder),
    )
    assert _hits(load("a = 1")) == 0
    assert len(list((tmp_path / "home" / "numba").glob("numba-*"))) == 1
    refused.append(tmp_path / "home" / "numba")
    assert [_hits(load("a = 1")), _hits(load("a = 1"))] == [0, 0]
    monkeypatch.setattr(compiled._CONFIG, "CACHE_DIR", str(tmp_path / "mine"))
    assert [_hits(load("a = 1")), _hits(load("a = 1"))] == [0, 1]
    assert str(tmp_path / "mine") == compiled._CONFIG.CACHE_DIR

"""Rules that no linter knows. Which package may import which: `lint-imports`, in pyproject.toml."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(ROOT / "pipelines").rglob("*.py"), *(ROOT / "rsnet").rglob("*.py")]
)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    """Absolute names of the imported modules; `from package import module` as package.module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            base = node.module or ""
            for alias in node.names:
                inner = ROOT / base.replace(".", "/") / f"{alias.name}.py"
                found.add(f"{base}.{alias.name}" if inner.exists() else base)
    return found


def _ours(path: Path) -> set[str]:
    return {name for name in _imports(path) if name.split(".")[0] in ("pipelines", "rsnet")}


def test_environment_variables_of_torchrun_are_read_in_one_place():
    readers = {
        _module(p)
        for p in SOURCES
        if any(f'"{v}"' in p.read_text() for v in ("RANK", "WORLD_SIZE"))
    }
    assert readers == {"rsnet.distributed.process_group"}


def test_there_is_one_backward():
    calls = [p for p in SOURCES for line in p.read_text().splitlines() if ".backward(" in line]
    assert [_module(p) for p in calls] == ["rsnet.training.trainer"]


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", sorted(ROOT.glob("train_*.py")), ids=_module)
def test_entry_scripts_only_compose(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 40
    allowed = {"pipelines.dali", "pipelines.ffcv", "pipelines.utils.cli", "rsnet.train"}
    assert _ours(path) <= allowed
    assert not any(
        isinstance(node, ast.For | ast.While | ast.FunctionDef | ast.ClassDef)
        for node in ast.walk(ast.parse(source))
    )

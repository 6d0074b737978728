"""Rules that no linter knows. Which package may import which: `lint-imports`, in pyproject.toml."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(ROOT / "pipelines").rglob("*.py"), *(ROOT / "rsnet").rglob("*.py")]
)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def _imports(path: Path) -> set[str]:
    """Absolute names of the imported modules; `from package import module` as package.module."""
    found = set()
    for node in _nodes(path):
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


def test_what_is_said_is_one_line_for_a_break_would_be_printed_escaped():
    for path in SOURCES:
        for node in _nodes(path):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "say":
                texts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
                assert not any("\n" in str(text) for text in texts), f"{path}:{node.lineno}"


def test_environment_variables_of_torchrun_are_read_in_one_place():
    readers = {
        _module(p)
        for p in SOURCES
        if any(f'"{v}"' in p.read_text() for v in ("RANK", "WORLD_SIZE"))
    }
    assert readers == {"rsnet.distributed.process_group"}


def test_lines_with_names_in_them_are_printed_by_what_escapes_them():
    """`print` is for tables and JSON, whose texts are escaped."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in _nodes(path)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        if isinstance(node.args[0], ast.JoinedStr) and _module(path) != "rsnet.__main__"
    ]
    assert not found


def test_there_is_one_backward():
    calls = [p for p in SOURCES for line in p.read_text().splitlines() if ".backward(" in line]
    assert [_module(p) for p in calls] == ["rsnet.training.trainer"]


def test_files_are_short():
    lines = {_module(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


@pytest.mark.parametrize("path", sorted(ROOT.glob("train_*.py")), ids=_module)
def test_entry_scripts_only_compose(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 40
    allowed = {"pipelines.dali", "pipelines.ffcv", "pipelines.utils.cli", "rsnet.train"}
    assert _ours(path) <= allowed
    assert not any(
        isinstance(node, ast.For | ast.While | ast.FunctionDef | ast.ClassDef)
        for node in _nodes(path)
    )


def _born_outside_init(path: Path) -> list[str]:
    """Return Class.attribute of what methods assign to self, and neither __init__ nor the body declares.

    A class's bases count where they are in the same file; other bases are taken to declare nothing.
    """
    classes = {n.name: n for n in _nodes(path) if isinstance(n, ast.ClassDef)}

    def assigned(method: ast.AST) -> set[str]:
        return {
            node.attr
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }

    def declared(node: ast.ClassDef) -> set[str]:
        names: set[str] = set()
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                names.add(statement.target.id)
            elif isinstance(statement, ast.Assign):
                names |= {t.id for t in statement.targets if isinstance(t, ast.Name)}
            elif isinstance(statement, ast.FunctionDef):
                is_setter = any(isinstance(d, ast.Attribute) for d in statement.decorator_list)
                if statement.name == "__init__":
                    names |= assigned(statement)
                elif is_setter:
                    names.add(statement.name)
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in classes:
                names |= declared(classes[base.id])
        return names

    return [
        f"{node.name}.{name}"
        for node in classes.values()
        for name in sorted(assigned(node) - declared(node))
    ]


def test_no_attribute_is_born_outside_init():
    assert {_module(p): born for p in SOURCES if (born := _born_outside_init(p))} == {}


def test_an_attribute_that_a_method_makes_is_found(tmp_path):
    (tmp_path / "a.py").write_text(
        "class A:\n"
        "    x: int\n"
        "    def __init__(self): self.y, self.z = 1, 2\n"
        "    def f(self): self.x = self.y = self.late = 0\n"
        "class B(A):\n"
        "    def f(self): self.z = self.w = 0\n"
    )
    assert _born_outside_init(tmp_path / "a.py") == ["A.late", "B.w"]


def test_what_the_mutation_check_breaks_is_there_once():
    counts = {m.name: (ROOT / m.file).read_text().count(m.old) for m in MUTATIONS}
    assert {name: count for name, count in counts.items() if count != 1} == {}

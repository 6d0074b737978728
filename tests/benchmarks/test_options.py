"""Command lines of all benchmarks: help, and one line for what nothing can be measured with."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import benchmarks
from benchmarks.gpu import measure
from benchmarks.options import LEAST, command, require_valid
from pipelines.utils.cli import parse_options
from pipelines.utils.errors import UsageError
from tests.helpers.runs import write_run
from tests.helpers.written import FOLDER as WRITTEN

FOLDER = Path(measure.__file__).parents[1]
NAMES = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__main__")
    for path in FOLDER.rglob("*.py")
    if "sys.exit(command(" in path.read_text()
)


def _script(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}{'.__main__' if name == 'study' else ''}")


def _run(name: str, *words: str) -> int:
    script = _script(name)
    return command(name, script.Options, script.run, words)


@pytest.fixture(scope="module")
def fine(photos, tmp_path_factory) -> dict[str, Path]:
    """What there may be for the fields of options that are paths."""
    folder = tmp_path_factory.mktemp("fine")
    for split in ("train", "val"):
        (folder / f"{split}.beton").touch()
    run = write_run(folder / "run")
    return {
        "data": photos,
        "beton": folder,
        "checkpoint": run / "checkpoints" / "best.pt",
        "release": WRITTEN / "release",
        "image": WRITTEN / "images" / "val" / "ant" / "0.png",
        "output": folder / "new",
        "folder": folder / "new",
        "results": folder / "new",
        "trace": folder / "train.beton",
    }


@functools.cache
def _paths(name: str) -> list[str]:
    hints = get_type_hints(_script(name).Options)
    return [field for field, kind in hints.items() if "Path" in str(kind)]


def test_every_script_with_options_is_run_by_the_command_that_checks_them():
    with_options = {p for p in FOLDER.rglob("*.py") if "\nclass Options" in p.read_text()}
    assert len(NAMES) == len(with_options) > 20


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_is_measured_and_a_mistyped_option_is_one_line(name, capsys):
    with pytest.raises(SystemExit) as stop:
        _run(name, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: benchmarks.{name} ")
    about, example, *_ = (_script(name).__doc__ or "").split("\n\n")
    if name != "study":  # whose options say it in other words
        assert " ".join(about.split()) in " ".join(text.split())
        assert f"\n{example}\n" in text
    assert _run(name, "--sized", "32") == 2
    assert capsys.readouterr().err.startswith(
        f"benchmarks.{name}: error: --sized: there is no such option; "
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_number_with_which_nothing_can_be_measured_is_named(name, fine):
    options = _script(name).Options
    hints = get_type_hints(options)
    given = {field: fine[field] for field in _paths(name) if hints[field] is Path}
    require_valid(options(**given))
    for field in dataclasses.fields(options):
        kind = str(hints[field.name])
        for number in (0, -1):
            if not ("int" in kind or "float" in kind) or number >= field.metadata.get(LEAST, 1):
                continue
            value: Any = float(number) if "float" in kind else number
            if "tuple" in kind:
                value = (value,)
            flag = f"--{field.name.replace('_', '-')} {number}: "
            with pytest.raises(UsageError, match=f"^{flag}"):
                require_valid(options(**given | {field.name: value}))


@pytest.mark.parametrize(
    ("name", "flag"), [(name, path) for name in NAMES for path in _paths(name)]
)
def test_a_wrong_path_is_one_line_that_names_it(name, flag, fine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello\n")
    hints = get_type_hints(_script(name).Options)
    given = {f: [f"--{f}", str(fine[f])] for f in _paths(name) if hints[f] is Path or f == flag}
    wrong = ["nowhere", "empty", "text"]
    if flag in ("output", "folder", "results"):  # which may be missing or empty
        wrong = ["text"]
    elif flag in ("data", "image") and {"release", "checkpoint"} & given.keys():  # read before it
        wrong = ["nowhere"]
    for value in wrong:
        given[flag][1] = value
        words = [word for pair in given.values() for word in pair if word != "--trace"]
        assert _run(name, *words) in (1, 2)
        err = capsys.readouterr().err.strip().splitlines()
        assert len(err) == 1
        assert err[0].startswith(f"benchmarks.{name}: error: ")
        assert value in err[0]


def test_a_library_that_scripts_import_is_looked_for_before_one_is_run(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "numba" else found(n))
    importlib.reload(benchmarks)
    monkeypatch.setattr("sys.argv", ["-m"])
    with pytest.raises(SystemExit, match="2"):
        importlib.reload(benchmarks)
    line = 'numba is not installed: pip install "rsnet-trainer[train]"'
    assert capsys.readouterr().err == f"benchmarks: error: {line}\n"


@pytest.mark.parametrize(
    "name", ["throughput", "evaluation", "roofline", "operations", "step_ways"]
)
@pytest.mark.parametrize("arch", ["resnet181", "timm/resnet18", "vit_b_16", "parallel_resnet10"])
def test_a_network_that_cannot_be_compared_is_one_line(name, arch, capsys):
    assert _run(name, "--arch", arch) == 2
    assert capsys.readouterr().err == (
        f"benchmarks.{name}: error: --arch {arch}: it takes torchvision's ResNets and MobileNetV2\n"
    )


def test_a_way_that_needs_a_gpu_is_not_begun_without_one(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _run("step_ways", "--ways", "recompute norm", "cuda graphs") == 2
    said = capsys.readouterr().err
    assert said == "benchmarks.step_ways: error: --ways 'cuda graphs': it needs a GPU\n"


@pytest.mark.parametrize("part", measure.PARTS)
def test_the_words_of_a_part_are_options_of_its_script(part, tmp_path):
    _, words = measure.words_of(part, measure.Options(tmp_path, tmp_path / "out"))
    if words[0].startswith("benchmarks."):
        options = _script(words[0].removeprefix("benchmarks.")).Options
        require_valid(parse_options(options, [options], words[1:]))

"""What is installed by `pip install`: the wheel, the core dependencies alone, the names of `import rsnet`."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rsnet
from pipelines.utils import cli
from rsnet.__main__ import ALIASES, VERBS, main
from rsnet.models import factory, switchable
from rsnet.release import package
from tests.helpers import releases
from tests.helpers.packages import uv

ROOT = Path(__file__).parents[1]
WRITTEN = ROOT / "tests" / "data" / "written_by_0.1"


def _python(*words: str, cwd: Path = ROOT, python: str = sys.executable) -> str:
    done = subprocess.run([python, *words], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tests_see_the_files_of_this_folder():
    """An environment that several clones share may have one of them installed."""
    assert Path(rsnet.__file__).parent == ROOT / "rsnet"
    assert Path(cli.__file__).parents[1] == ROOT / "pipelines"


def test_importing_rsnet_imports_no_torch():
    heavy = ("torch", "torchvision", "numpy", "tyro")
    code = f"import sys, rsnet, rsnet.__main__; print([n for n in {heavy} if n in sys.modules])"
    assert _python("-c", code) == "[]\n"


def test_listing_the_verbs_imports_neither_torch_nor_tyro():
    code = (
        "import sys; from rsnet.__main__ import main; main(['--help']); "
        "print([n for n in ('torch', 'numpy', 'tyro', 'rich') if n in sys.modules])"
    )
    assert _python("-c", code).splitlines()[-1] == "[]"


def test_the_names_that_programs_import_are_those_of_their_modules():
    assert rsnet.load is package.load
    assert rsnet.create_model is factory.create_model
    assert rsnet.make_switchable is switchable.make_switchable
    assert {rsnet.ModelConfig.__name__, rsnet.SwitchableClassifier.__name__} <= set(rsnet.__all__)
    assert set(rsnet.__all__) <= set(dir(rsnet))
    with pytest.raises(AttributeError, match="'rsnet' has no attribute 'loda'"):
        rsnet.loda  # noqa: B018


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rsnet {rsnet.__version__}\n"


def test_the_version_that_cannot_be_printed_ends_without_a_traceback(monkeypatch):
    with Path("/dev/full").open("wb", 0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        assert main(["--version"]) == 0


def test_every_verb_has_a_module():
    assert {"train", "verify", "convert", *ALIASES.values()} <= set(VERBS)
    for verb in VERBS.values():
        assert importlib.util.find_spec(verb.module), verb.module
        assert verb.extra in {*cli.EXTRAS.values()}


@pytest.mark.parametrize(
    ("library", "extra"), [("tyro.conf", "export"), ("fastapi", "serve"), ("nvidia.dali", "train")]
)
def test_a_verb_without_its_library_is_one_line_that_names_the_extra(
    tmp_path, monkeypatch, capsys, library, extra
):
    (tmp_path / "a_verb.py").write_text(f"import {library}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_verb", raising=False)
    monkeypatch.setitem(sys.modules, library.split(".")[0], None)
    monkeypatch.setitem(sys.modules, library, None)
    assert cli.run_verb("a verb", cli.Verb("a_verb", "", extra="export"), []) == 2
    line = f'{library.split(".")[0]} is not installed: pip install "rsnet-trainer[{extra}]"\n'
    assert capsys.readouterr().err == f"a verb: error: {line}"


def test_a_script_without_its_libraries_is_one_line(tmp_path):
    (tmp_path / "tyro.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'tyro'\", name='tyro')"
    )
    done = subprocess.run(
        [sys.executable, "train_dali.py", "--help"], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    line = 'tyro is not installed: pip install "rsnet-trainer[train]"'
    assert done.stderr == f"train_dali.py: error: {line}\n"


def test_a_module_of_ours_that_is_missing_is_a_fault_of_the_program():
    def action() -> int:
        raise ModuleNotFoundError("No module named 'rsnet.lost'", name="rsnet.lost")

    with pytest.raises(ModuleNotFoundError):
        cli.exit_code("name", action)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by hatchling; skips where neither uv nor hatchling can be had."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--quiet", "--wheel", "--out-dir", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment that has the wheel and what it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("env") / "env"
    uv("venv", "--quiet", "--python", sys.executable, str(folder))
    # The versions of the lock: they lie in uv's cache, from which files are linked, not copied.
    pinned = folder / "pinned.txt"
    export = ("export", "--quiet", "--frozen", "--no-dev", "--no-hashes", "--no-emit-project")
    pinned.write_text(uv(*export, "--project", str(ROOT)))
    python = str(folder / "bin" / "python")
    uv("pip", "install", "--quiet", "--python", python, "-c", str(pinned), str(wheel))
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_holds_all_files_of_both_packages(wheel):
    found = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith(("rsnet/", "pipelines/"))}
    expected = {
        str(p.relative_to(ROOT))
        for name in ("rsnet", "pipelines")
        for p in (ROOT / name).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert found == expected
    assert {"rsnet/py.typed", "pipelines/py.typed", "rsnet/serving/page/index.html"} <= found


@pytest.mark.slow
def test_the_core_alone_loads_a_release_and_predicts(installed, tmp_path):
    release = shutil.copytree(WRITTEN / "release", tmp_path / "release")
    image = str(WRITTEN / "images" / "val" / "ant" / "0.png")
    code = (
        "import sys, json, rsnet; from pathlib import Path\n"
        "classifier = rsnet.SwitchableClassifier.load(Path('release'), 'cpu')\n"
        f"(found,) = classifier.classify([{image!r}], size=24)\n"
        "optional = {'tyro', 'rich', 'wandb', 'matplotlib', 'nvidia', 'numba'}\n"
        "print(json.dumps([found.classes, found.probabilities, rsnet.__file__,\n"
        "    sorted(optional & {n.split('.')[0] for n in sys.modules})]))\n"
    )
    out = _python("-c", code, cwd=tmp_path, python=str(installed / "python"))
    classes, probabilities, file, optional = json.loads(out)
    assert Path(file).is_relative_to(installed.parent)
    assert optional == []
    (expected,) = rsnet.SwitchableClassifier.load(release, "cpu").classify([image], size=24)
    assert classes == list(expected.classes)
    assert probabilities == pytest.approx(expected.probabilities, abs=1e-5)


@pytest.mark.slow
def test_the_core_alone_runs_what_the_model_card_says(installed, tmp_path):
    folder = releases.write(tmp_path / "release")
    card = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert blocks
    for block in blocks:
        _python("-W", "error", "-c", block, cwd=folder, python=str(installed / "python"))


@pytest.mark.slow
def test_the_command_of_the_core_alone_says_what_is_missing(installed, tmp_path):
    command = [installed / "rsnet"]
    version = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert version.stdout == f"rsnet {rsnet.__version__}\n"
    done = subprocess.run(
        [*command, "predict", "release", "image.jpg"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    line = 'tyro is not installed: pip install "rsnet-trainer[cli]"'
    assert done.stderr == f"rsnet predict: error: {line}\n"

"""The documentation says what the code does: commands parse, links lead somewhere, errors are explained."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import dali, ffcv
from pipelines.demo import DemoOptions
from pipelines.ffcv import ConvertOptions
from pipelines.utils.cli import Verb, parse_options
from rsnet.__main__ import VERBS
from rsnet.__main__ import main as verbs
from rsnet.checkpoint.authors_pytorch import to_original
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.command_line import parse
from rsnet.config.model_config import ModelConfig
from rsnet.config.option_rules import option_rules
from rsnet.models.factory import create_model, list_models
from rsnet.train import main
from tests.conftest import needs_ffcv

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
SCRIPTS = {
    "train_dali.py": (dali.DaliOptions, dali.make_loaders),
    "train_ffcv.py": (ffcv.FfcvOptions, ffcv.make_loaders),
}
# Programs that are not ours: what follows is not looked at, unless it is one of our scripts.
OTHERS = ("pip install ", "source .venv/bin/activate", "git clone ", "conda ", "hf auth ", "aws ")
README_BYTES = 8192


def _blocks(language: str) -> list[tuple[str, str]]:
    """(page, block) of all fenced blocks in a language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.S | re.M)
    return [(page, block) for page, text in PAGES.items() for block in pattern.findall(text)]


COMMANDS = [
    pytest.param(line, id=f"{page}: {line[:60]}")
    for page, block in _blocks("sh")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def _options(verb: Verb) -> Any:
    """The dataclass of a verb's options."""
    return getattr(importlib.import_module(verb.module), verb.options)


def _words(command: str) -> tuple[str, list[str]]:
    """What a command runs (`make`, a script, `rsnet VERB`, a module), and its arguments."""
    words = shlex.split(command)
    for i, word in enumerate(words):  # a launcher stands before them
        if word in SCRIPTS:
            return word, words[i + 1 :]
    if words[0].endswith("slurm.sh") or words[0] == "sbatch":
        (at,) = (i for i, word in enumerate(words) if word.endswith("slurm.sh"))
        return "train_dali.py", words[at + 1 :]
    if words[0] == "torchrun":  # before a module
        words = words[words.index("-m") + 1 :]
    if words[:2] == ["python", "-m"]:
        words = [" ".join(words[:3]), *words[3:]]
    elif words[0] == "python":
        words = words[1:]
    if words[:2] == ["rsnet", "train"]:  # as the script whose options it has
        data = words[1 + next(i for i, w in enumerate(words) if w in ("--data", "-d"))]
        return ("train_ffcv.py" if "beton" in data else "train_dali.py"), words[2:]
    if words[0] == "rsnet":
        return " ".join(words[:2]), words[2:]
    return words[0], words[1:]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command):
    if command.startswith(OTHERS):
        return
    program, arguments = _words(command)
    verb = program.removeprefix("rsnet ")
    options_type: Any
    if program in SCRIPTS:
        config, _ = parse(SCRIPTS[program][0], arguments)
        assert config.arch is None or config.arch in list_models()
    elif program == "make":
        assert f"\n{arguments[0]}: " in (ROOT / "Makefile").read_text()
    elif program.startswith("rsnet ") and verb in VERBS:
        options_type = _options(VERBS[verb])
        parse_options(options_type, [options_type], arguments)
    elif program == "python -m pipelines.demo":
        parse_options(DemoOptions, [DemoOptions], arguments)
    elif program.startswith("python -m benchmarks."):
        module = importlib.import_module(program.removeprefix("python -m "))
        parse_options(module.Options, [module.Options], arguments)
    else:
        assert (ROOT / program).is_file(), f"what does {program!r} run?"


@pytest.mark.parametrize(("page", "block"), _blocks("python"))
def test_a_python_block_is_python(page, block):
    ast.parse(block, page)


def test_the_list_of_verbs_is_what_the_command_prints(capsys):
    assert verbs(["--help"]) == 0
    assert f"$ rsnet --help\n{capsys.readouterr().out}```" in PAGES["docs/getting-started.md"]


def test_the_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= README_BYTES


def _anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    words = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {re.sub(r" ", "-", w.strip()) for w in words}


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in _anchors(path.read_text()), target


def test_the_files_and_modules_that_the_texts_name_are_there():
    texts = PAGES | {
        str(path.relative_to(ROOT)): path.read_text()
        for path in (ROOT / "CHANGELOG.md", *(ROOT / "benchmarks" / "results").glob("*.md"))
    }
    folders = "rsnet|pipelines|tests|benchmarks|docs|scripts|examples"
    named = re.compile(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w|(?:{folders})(?:\.[a-z]\w*)+)")
    missing = [
        f"{page}: {name}"
        for page, text in texts.items()
        for name in named.findall(text)
        if not (ROOT / name).exists() and not _is_importable(name)
    ]
    assert not missing


def _is_importable(name: str) -> bool:
    """Whether it is a module, or a name in one."""
    module, _, last = name.rpartition(".")
    if not module or "/" in name:
        return False
    try:
        return hasattr(importlib.import_module(module), last) or bool(
            importlib.util.find_spec(name)
        )
    except ImportError:
        return False


def test_the_page_of_options_is_what_the_code_says():
    script = runpy.run_path(str(ROOT / "scripts" / "options_page.py"))
    assert PAGES["docs/options.md"] == script["page"]()


def test_every_page_is_in_the_sites_navigation_and_in_the_index():
    navigation = (ROOT / "zensical.toml").read_text()
    for page in PAGES:
        if page.startswith("docs/"):
            name = page.removeprefix("docs/")
            assert f'"{name}"' in navigation, name
            assert name == "index.md" or f"({name})" in PAGES["docs/index.md"], name


def test_the_demos_commands_in_the_makefile_are_understood():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    options = re.search(r"DEMO_OPTIONS := (.*)", makefile).group(1).replace("$(DEMO_RUN)", "x")
    lines = [row for row in makefile.splitlines() if "$(DEMO_OPTIONS)" in row]
    assert len(lines) == 2
    for line in lines:
        script, arguments = _words(line.strip().replace("$(DEMO_OPTIONS)", options))
        parse(SCRIPTS[script][0], arguments)
    (line,) = (row for row in makefile.splitlines() if "-m pipelines.beton" in row)
    parse_options(ConvertOptions, [ConvertOptions], shlex.split(line)[3:])


def _messages() -> dict[str, str]:
    """By its place, how the longest fixed part of the first clause of every one-line error begins."""
    found = {}
    for package in ("rsnet", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                name = getattr(getattr(node, "func", None), "id", "")
                if name in ("UsageError", "DataError", "RunError") and node.args:
                    text = _fixed_parts(node.args[0])
                    part = max(re.split(r"\0", text.split(";")[0]), key=len).strip(" :,.(")[:30]
                    if len(part) >= 8:
                        found[f"{path.relative_to(ROOT)}:{node.lineno}"] = part
    return found


def _fixed_parts(node: ast.AST) -> str:
    """The text of a string expression, with a NUL for each part that is computed."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_fixed_parts, node.values))
    if isinstance(node, ast.BinOp):
        return _fixed_parts(node.left) + _fixed_parts(node.right)
    return "\0"


def test_every_error_message_is_explained():
    page = " ".join(PAGES["docs/troubleshooting.md"].replace("`", "").split())
    messages = _messages()
    assert len(messages) > 150
    missing = {where: text for where, text in messages.items() if text.replace("`", "") not in page}
    assert not missing, "\n".join(f"{where}: {text}" for where, text in missing.items())


def test_every_rule_of_an_option_is_explained():
    rules = {rule for *_, rule in option_rules(parse(dali.DaliOptions, ["--data", "x"])[0])}
    assert not {rule for rule in rules if rule not in PAGES["docs/troubleshooting.md"]}


# In an order in which what one page writes is there for the next.
RUN_PAGES = (
    "README.md",
    "docs/getting-started.md",
    "docs/evaluation.md",
    "docs/your-data.md",
    "docs/from-the-original.md",
    "docs/ffcv-and-dali.md",
    "docs/performance.md",
)


@pytest.mark.slow  # more than a minute; .ci/run has it
@needs_ffcv
def test_the_imagenet_commands_run(photos, tmp_path, monkeypatch, capsys):
    """On a small folder with small sizes, narrow, without torchrun.

    Other recipes are run by tests/scripts/test_short_recipe.py, quantized networks by
    tests/scripts/test_quantized_training.py, with smaller networks.
    """
    monkeypatch.chdir(tmp_path)
    config = ModelConfig("parallel_resnet18", 3, (160, 32))
    model = create_model(config)
    content = {"network": config.to_dict(), "model": model.state_dict(), "epoch": 1}
    torch.save(to_original(Checkpoint.from_dict(content)), "model_best.pth.tar")
    small = ["--epochs", "1", "--batch-size", "4", "--workers", "1", "--wandb", "disabled"]
    small += ["--profile-steps", "1", "--profile-limit", "1"]
    blocks = [block for wanted in RUN_PAGES for page, block in _blocks("sh") if page == wanted]
    ran = 0
    lines = dict.fromkeys(line for block in blocks for line in block.splitlines())  # each once
    for number, line in enumerate(lines):
        if ("/imagenet" not in line and " import " not in line) or "s3://" in line:
            continue
        if line.startswith(("torchrun", "sbatch")) or "--recipe" in line or "--real" in line:
            continue
        here = line.replace("/imagenet_", f"{tmp_path}/").replace("/imagenet", str(photos))
        program, arguments = _words(here)
        if program == "rsnet import":
            arguments += ["--sizes", "160", "32"]
        if program.startswith("rsnet "):
            assert verbs([program.removeprefix("rsnet "), *arguments]) == 0
        elif program in SCRIPTS:
            if "--sizes" not in arguments:
                arguments += ["--sizes", "160", "32"]
            if "--evaluate" not in arguments and "--profile" not in arguments:
                arguments += [
                    "--output",
                    f"run{number}" if ran else "runs/parallel_resnet50-imagenet",
                ]
                ran += 1
            if "--resume" not in arguments:
                arguments += ["--width-mult", "0.25"]
            monkeypatch.setattr("sys.argv", [program, *arguments, *small])
            assert main(program, *SCRIPTS[program]) == 0
    assert ran > 3
    assert "     160" in capsys.readouterr().out

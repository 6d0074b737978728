"""The README says what the code does: its commands parse, its options and files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from pipelines import dali, ffcv
from pipelines.dali import verify
from pipelines.ffcv import ConvertOptions
from pipelines.ffcv import options as beton
from pipelines.utils.cli import command as run_command
from pipelines.utils.cli import parse_options, verb_command
from rsnet.__main__ import VERBS
from rsnet.__main__ import main as verbs
from rsnet.checkpoint.authors_pytorch import to_original
from rsnet.config.command_line import parse
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model, list_models
from rsnet.train import main
from tests.conftest import needs_ffcv

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
SCRIPTS = {
    "train_dali.py": (dali.DaliOptions, dali.make_loaders),
    "train_ffcv.py": (ffcv.FfcvOptions, ffcv.make_loaders),
}
TRAINING = [c for c in COMMANDS if any(script in c for script in SCRIPTS)]
CONVERTING = [c for c in COMMANDS if "pipelines.beton" in c]
VERIFYING = [c for c in COMMANDS if "pipelines.folder" in c]
VERBS_USED = [c for c in COMMANDS if c.startswith("python -m rsnet ")]


def _script(command: str) -> tuple[str, list[str]]:
    """The training script of a command, and its arguments."""
    words = shlex.split(command)
    (at,) = (i for i, word in enumerate(words) if word in SCRIPTS)
    return words[at], words[at + 1 :]


def test_every_command_is_a_make_target_or_one_of_ours():
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        if command.startswith("make "):
            assert f"\n{command.split()[1]}: " in makefile
        else:
            assert command in TRAINING + CONVERTING + VERIFYING + VERBS_USED


@pytest.mark.parametrize("command", TRAINING)
def test_a_training_command_is_understood(command):
    script, arguments = _script(command)
    config, _ = parse(SCRIPTS[script][0], arguments)
    if config.arch is not None:
        assert config.arch in list_models()


@pytest.mark.parametrize("command", CONVERTING)
def test_a_converting_command_is_understood(command):
    parse_options(ConvertOptions, [ConvertOptions], shlex.split(command)[3:])


@pytest.mark.parametrize("command", VERBS_USED)
def test_a_verb_is_understood(command):
    _, _, _, verb, *arguments = shlex.split(command)
    options_type = VERBS[verb][0]
    parse_options(options_type, [options_type], arguments)


@pytest.mark.parametrize("command", VERIFYING)
def test_a_verifying_command_is_understood(command):
    _, _, module, verb, *arguments = shlex.split(command)
    assert module == "pipelines.folder"
    options_type = verify.VERBS[verb][0]
    parse_options(options_type, [options_type], arguments)


@pytest.mark.slow  # half a minute; .ci/run has it
@needs_ffcv
def test_the_imagenet_commands_run(photos, tmp_path, monkeypatch, capsys):
    """In the order of the README, on a small folder with small sizes, narrow, without torchrun.

    Other recipes are run by test_modern_run.py, quantized networks by test_quantized_run.py, with smaller
    networks.
    """

    def elsewhere(command: str) -> bool:
        return any(flag in command for flag in ("--recipe", "--qw", "--mode"))

    monkeypatch.chdir(tmp_path)
    model = create_model(ModelConfig("parallel_resnet18", 3, (160, 32)))
    network = {"arch": "parallel_resnet18", "num_classes": 3, "sizes": [160, 32]}
    content = {"network": network, "model": model.state_dict(), "epoch": 1}
    torch.save(to_original(content), "model_best.pth.tar")
    small = ["--epochs", "1", "--batch-size", "4", "--workers", "1", "--wandb", "disabled"]
    small += ["--profile-steps", "1", "--profile-limit", "1"]
    for number, command in enumerate(COMMANDS):
        here = command.replace("/imagenet_", f"{tmp_path}/").replace("/imagenet", str(photos))
        if command in VERBS_USED and " import " in command:
            assert verbs([*shlex.split(here)[3:], "--sizes", "160", "32"]) == 0
        elif command in VERIFYING:
            assert verb_command("x", verify.VERBS, shlex.split(here)[3:]) == 0
        elif command in CONVERTING:
            assert run_command("x", ConvertOptions, beton.main, shlex.split(here)[3:]) == 0
        elif command in TRAINING and command.startswith("python") and not elsewhere(command):
            script, arguments = _script(here)
            if "--sizes" not in arguments:
                arguments += ["--sizes", "160", "32"]
            if script == "train_ffcv.py":
                arguments += ["--output", str(number)]
            if "--resume" not in arguments:
                arguments += ["--width-mult", "0.25"]
            monkeypatch.setattr("sys.argv", [script, *arguments, *small])
            assert main(script, *SCRIPTS[script]) == 0
    assert "     160" in capsys.readouterr().out


def test_the_demos_commands_in_the_makefile_are_understood():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    options = re.search(r"DEMO_OPTIONS := (.*)", makefile).group(1).replace("$(DEMO_RUN)", "x")
    lines = [row for row in makefile.splitlines() if "$(DEMO_OPTIONS)" in row]
    assert len(lines) == 2
    for line in lines:
        script, arguments = _script(line.replace("$(DEMO_OPTIONS)", options))
        parse(SCRIPTS[script][0], arguments)
    (line,) = (row for row in makefile.splitlines() if "-m pipelines.beton" in row)
    parse_options(ConvertOptions, [ConvertOptions], shlex.split(line)[3:])


def test_the_options_in_the_table_exist(capsys):
    table = README[README.index("## Options") : README.index("## What a run writes")]
    rows = [row for row in table.splitlines() if row.startswith("| `-")]
    flags = {f for row in rows for f in re.findall(r"`(--?[a-z-]+)`", row.split("|")[1])}
    assert len(flags) > 25
    listed: set[str] = set()
    for options_type, _ in SCRIPTS.values():
        with pytest.raises(SystemExit):
            parse(options_type, ["--help"])
        listed |= set(re.findall(r"--?[a-z-]+", capsys.readouterr().out))
    assert flags <= listed


def test_the_listed_modules_exist():
    block = README[README.index("## The code") : README.index("## Citing")]
    for folder in ("pipelines", "rsnet"):
        modules = re.search(rf"^{folder}/ .*?: (.*?)^\w", block, re.S | re.M).group(1)
        for name in re.split(r",\s*", modules.strip()):
            path = ROOT / folder / name.strip("/")
            assert path.is_dir() or path.with_suffix(".py").exists(), name

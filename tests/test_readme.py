"""The README says what the code does: its commands parse, its options and files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipelines.dali import DaliOptions, make_loaders
from rsnet.cli import parse
from rsnet.models.zoo import list_archs
from rsnet.run import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
TRAINING = [c for c in COMMANDS if "train_dali.py" in c]


def test_every_command_is_a_make_target_or_a_training_command():
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        if command.startswith("make "):
            assert f"\n{command.split()[1]}: " in makefile
        else:
            assert command in TRAINING


@pytest.mark.parametrize("command", TRAINING)
def test_a_training_command_is_understood(command):
    words = shlex.split(command)
    config, _ = parse(DaliOptions, words[words.index("train_dali.py") + 1 :])
    if config.arch is not None:
        assert config.arch in list_archs()


def test_the_imagenet_commands_run(photos, tmp_path, monkeypatch, capsys):
    """In the order of the README, on a small folder with small sizes, without torchrun."""
    monkeypatch.chdir(tmp_path)
    small = ["--epochs", "1", "--batch-size", "4", "--workers", "1", "--wandb", "disabled"]
    for command in TRAINING:
        words = shlex.split(command.replace("/imagenet", str(photos)))
        if words[0] != "python":
            continue
        sizes = [] if "--sizes" in words else ["--sizes", "160", "32"]
        monkeypatch.setattr("sys.argv", [*words[1:], *sizes, *small])
        assert main("train_dali.py", DaliOptions, make_loaders) == 0
    assert "     160" in capsys.readouterr().out


def test_the_demos_command_in_the_makefile_is_understood():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (line,) = (row for row in makefile.splitlines() if "train_dali.py" in row)
    words = shlex.split(line.replace("$(DEMO_RUN)", "demo/run"))
    parse(DaliOptions, words[words.index("train_dali.py") + 1 :])


def test_the_options_in_the_table_exist(capsys):
    rows = [row for row in README.splitlines() if row.startswith("| `-")]
    flags = {f for row in rows for f in re.findall(r"`(--?[a-z-]+)`", row.split("|")[1])}
    assert len(flags) > 25
    with pytest.raises(SystemExit):
        parse(DaliOptions, ["--help"])
    listed = set(re.findall(r"--?[a-z-]+", capsys.readouterr().out))
    assert flags <= listed


def test_the_listed_modules_exist():
    block = README[README.index("## The code") : README.index("## Citing")]
    for folder in ("pipelines", "rsnet"):
        modules = re.search(rf"^{folder}/ .*?: (.*?)^\w", block, re.S | re.M).group(1)
        for name in re.split(r",\s*", modules.strip()):
            path = ROOT / folder / name.strip("/")
            assert path.is_dir() or path.with_suffix(".py").exists(), name

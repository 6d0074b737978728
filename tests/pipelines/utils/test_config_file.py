"""`--config FILE`: what a file gives, and what the command line wins over."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from tyro.conf import Positional, arg

from pipelines.dali import DaliOptions
from pipelines.utils.cli import parse_options
from pipelines.utils.errors import UsageError
from rsnet.config.command_line import parse
from rsnet.config.train_config import to_plain_dict


@dataclass(frozen=True)
class Options:
    """Options of a test."""

    source: Positional[str]
    """An argument."""

    batch_size: Annotated[int, arg(aliases=("-b",))] = 4
    """A number."""

    sizes: Annotated[tuple[int, ...], arg(aliases=("--resolutions",))] = (32,)
    """Numbers."""

    amp: Literal["bf16", "off"] = "bf16"
    """A word that YAML 1.1 takes for a boolean."""

    fold: bool = False
    """A switch."""

    lr: float = 0.1
    """A number that YAML 1.1 takes for a word."""

    name: str | None = None
    """A text."""


def _parsed(path: Path, text: str, *words: str) -> Options:
    path.write_text(text)
    return parse_options(Options, [Options], ["it", "--config", str(path), *words])


def test_a_file_gives_what_the_command_line_does_not(tmp_path):
    text = "batch_size: 8\nsizes: [64, 48]\namp: off\nfold: true\nlr: 1e-4\nname: ~\n"
    path = tmp_path / "a.yaml"
    assert _parsed(path, text) == Options("it", 8, (64, 48), "off", True, 1e-4)
    assert _parsed(path, "batch-size: 8\nresolutions: [64]") == Options("it", 8, (64,))
    assert _parsed(path, text, "--sizes", "16", "--no-fold", "--lr=2", "-b", "2") == Options(
        "it", 2, (16,), "off", False, 2.0
    )
    assert _parsed(path, text, "-b2").batch_size == 2
    assert _parsed(path, text, "--batch_size", "3", "--resolutions", "16") == Options(
        "it", 3, (16,), "off", True, 1e-4
    )
    assert _parsed(tmp_path / "a.json", json.dumps({"sizes": [], "name": "-x"})) == Options(
        "it", sizes=(), name="-x"
    )


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("batchsize: 8", UsageError, "batchsize: there is no such option; did you mean --batch-size?"),
        ("learning_rate: 8", UsageError, "learning_rate: there is no such option; did you mean --lr?"),
        ("source: x", UsageError, "source: there is no such option"),
        ("lr: {a: 1}", UsageError, "lr: give a value, or a list of values"),
        ("[1, 2]", UsageError, "give lines such as `epochs: 30`"),
        ("", UsageError, "give lines such as `epochs: 30`"),
        ("a: b: c", UsageError, "it cannot be read (mapping values are not allowed here"),
        ("lr: [" * 5000, UsageError, "it cannot be read ("),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_one_line_with_its_name(tmp_path, text, error, message):
    path = tmp_path / "a.yaml"
    with pytest.raises(error) as caught:
        _parsed(path, text)
    assert str(caught.value).startswith(f"--config {path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_value_in_a_file_is_refused(tmp_path):
    """As a path it would be the current folder."""
    with pytest.raises(UsageError, match=r"^--name: the value is empty$"):
        _parsed(tmp_path / "a.yaml", 'name: ""\n')


def test_the_home_of_a_user_who_does_not_exist_is_a_file_that_is_not_there():
    with pytest.raises(UsageError, match=r"--config: there is no file ~nobody-here/x\.yaml"):
        parse_options(Options, [Options], ["it", "--config", "~nobody-here/x.yaml"])


def test_a_file_that_is_not_there_is_named():
    for words in (["--config", "none.yaml"], ["--config=none.yaml"]):
        with pytest.raises(UsageError, match=r"^--config: there is no file none.yaml$"):
            parse_options(Options, [Options], ["it", *words])
    with pytest.raises(UsageError, match=r"^--config: the value is empty$"):
        parse_options(Options, [Options], ["it", "--config"])


def test_a_runs_options_are_read_from_its_config_json(tmp_path):
    words = [
        "--data",
        "x",
        "--arch",
        "resnet18",
        "--sched",
        "cos",
        "--lr",
        "0.3",
        "--sizes",
        "64",
        "32",
    ]
    words += ["--no-kd", "--no-norm-weight-decay", "--on-nonfinite", "skip", "3"]  # fmt: skip
    expected, pipeline = parse(DaliOptions, words)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_plain_dict(expected) | to_plain_dict(pipeline)))
    assert parse(DaliOptions, ["--config", str(path)]) == (expected, pipeline)
    changed, _ = parse(DaliOptions, ["--config", str(path), "--norm-weight-decay", "--kd"])
    assert (changed.decay, changed.kd, changed.lr) == ("all", True, 0.3)


def test_the_originals_word_for_cosine_is_known_in_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text("data: x\nlr_decay: cos\n")
    config, _ = parse(DaliOptions, ["--config", str(tmp_path / "a.yaml")])
    assert config.lr_decay == "cosine"

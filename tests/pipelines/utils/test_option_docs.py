"""`--help`, and the names that users of other trainers type."""

from __future__ import annotations

import importlib
import re

import pytest

from pipelines.dali import DaliOptions
from pipelines.ffcv import FfcvOptions
from pipelines.utils import synonyms
from pipelines.utils.option_docs import INDENT, flags
from rsnet.__main__ import VERBS, main
from rsnet.config.command_line import parse
from rsnet.config.train_config import TrainConfig
from rsnet.train import main as train

OPTIONS = {
    name: getattr(importlib.import_module(verb.module), verb.options)
    for name, verb in VERBS.items()
    if verb.options
}
TRAINING = flags(TrainConfig) | flags(DaliOptions) | flags(FfcvOptions)


def _help(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_one_line_of_usage_and_every_option_once(capsys, verb):
    text = _help(capsys, verb)
    usage, blank, *_ = text.splitlines()
    assert usage.startswith(f"usage: rsnet {verb} ")
    assert usage.endswith(" [options]")
    assert blank == ""
    known = TRAINING if verb == "train" else flags(OPTIONS[verb])
    named = re.findall(r"^  (-[^ ,]+(?:, --?[^ ,]+)*)", text, re.M)
    listed = [flag for names in named for flag in names.split(", ")]
    assert len(listed) == len(set(listed))
    own = {flag for flag in listed if not flag.startswith("--no-") or flag in known}
    ffcv_alone = set(flags(FfcvOptions)) - set(flags(DaliOptions)) if verb == "train" else set()
    pipeline = {"--pipeline"} if verb == "train" else set()
    assert own == set(known) - ffcv_alone | pipeline | {"-h", "--help", "--config"}
    assert "None" not in text
    assert "Unset:" not in text
    assert all(entry.count("Default: ") <= 1 for entry in re.split(r"\n(?=  -|\n)", text))
    assert max(map(len, text.splitlines())) <= 80 or "usage" in max(text.splitlines(), key=len)


def test_help_of_training_is_by_topic_and_says_defaults_in_words(capsys):
    text = _help(capsys, "train")
    assert text.startswith("usage: rsnet train --data DIR [options]\n")
    topics = re.findall(r"^([A-Z].*[^.\n])$", text, re.M)
    assert topics[:3] == ["Data and batch size", "Network", "Optimizer"]
    assert "Reading with DALI" in topics
    assert "Default: the recipe's 0.1 (strong 0.125, MobileNets 0.05; see --opt)" in _joined(text)
    assert "--amp {bf16,fp16,off}" in text
    assert "Reading .beton files" in _help(capsys, "train", "--pipeline", "ffcv")


def test_usage_marks_what_may_be_left_out(capsys):
    assert _help(capsys, "list").startswith("usage: rsnet list [PATTERN] [options]\n")
    assert _help(capsys, "export").startswith("usage: rsnet export RUN|FILE|RELEASE --output OUT [")


def test_help_of_a_script_has_its_name(capsys):
    from pipelines.dali import make_loaders

    with pytest.raises(SystemExit):
        train("train_dali.py", DaliOptions, make_loaders, ["--help"])
    assert capsys.readouterr().out.startswith("usage: train_dali.py --data DIR [options]\n")


def _joined(text: str) -> str:
    return text.replace("\n" + " " * INDENT, " ")


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--learning-rate", "--lr"), ("--learning_rate", "--lr"), ("--num-epochs", "--epochs"),
        ("--num_train_epochs", "--epochs"), ("--output-dir", "--output"), ("--model", "--arch"),
        ("--data-path", "--data"), ("--per_device_train_batch_size", "--batch-size"),
        ("--img-size", "--sizes"), ("--num-workers", "--workers"), ("--grad-clip", "--clip-grad"),
        ("--weights", "--pretrained"), ("--resume-from-checkpoint", "--resume"),
        ("--eval-only", "--evaluate"), ("--fp16", "--amp"), ("--save-every", "--checkpoint-every"),
        ("--epoch", "--epochs"), ("--labelsmoothing", "--label-smoothing"),
        ("--weigth-decay", "--weight-decay"),
    ],
)  # fmt: skip
def test_what_other_trainers_call_an_option_is_understood(capsys, flag, meant):
    assert main(["train", flag, "1"]) == 2
    line = f"rsnet train: error: {flag}: there is no such option; did you mean {meant}?\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("flag", ["--n-gpu", "--gpus", "--num_processes", "--dist-url"])
def test_who_asks_for_gpus_is_told_of_torchrun(flag):
    assert synonyms.advice(flag, TRAINING).startswith("torchrun starts one process a GPU")


def test_an_option_of_one_verb_is_not_advised_for_another(capsys):
    assert synonyms.advice("--img-size", flags(OPTIONS["predict"])) == "did you mean --size?"
    assert synonyms.advice("--fp16", flags(OPTIONS["bench"])) == "did you mean --dtype?"
    assert main(["release", "x", "--learning-rate", "1"]) == 2
    assert "--learning-rate: there is no such option; --help" in capsys.readouterr().err


def test_every_option_that_is_advised_exists_and_no_name_of_ours_is_taken_for_another():
    known = set(TRAINING).union(*(flags(options) for options in OPTIONS.values()))
    for ours, others in synonyms._MEANINGS.items():
        assert {f"--{name}" for name in ours} <= known
        for other in others.split():
            assert f"--{other}" not in TRAINING or other in ours, other


def test_an_underscore_is_a_hyphen():
    assert parse(DaliOptions, ["--data", "x", "--batch_size", "7"])[0].batch_size == 7

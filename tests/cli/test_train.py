"""`rsnet train`: which pipeline reads the data, and how it names itself."""

from __future__ import annotations

import json
import os
import shlex

import pytest

from pipelines import dali, ffcv
from rsnet.__main__ import main
from rsnet.cli import train
from tests.helpers.faults import RUN


@pytest.fixture
def chosen(monkeypatch):
    """Call `rsnet train`; return the options' type that would parse its words."""
    found = []
    monkeypatch.setattr(train, "main", lambda *given: found.append(given) or 0)

    def call(*words: object) -> type:
        assert main(["train", *map(str, words)]) == 0
        name, options_type, make_loaders, argv = found.pop()
        assert (name, argv) == ("rsnet train", [str(word) for word in words])
        pipeline = ffcv if options_type is train.FfcvTrainOptions else dali
        assert make_loaders is pipeline.make_loaders
        return options_type

    return call


@pytest.mark.parametrize("flag", [["--data"], ["-d"], ["--data="]])
def test_a_folder_with_beton_files_is_read_by_ffcv_and_another_by_dali(chosen, tmp_path, flag):
    images, betons = tmp_path / "images", tmp_path / "betons"
    images.mkdir()
    betons.mkdir()
    (betons / "train.beton").touch()
    for folder, expected in (
        (images, train.DaliTrainOptions),
        (betons, train.FfcvTrainOptions),
    ):
        words = [f"{flag[0]}{folder}"] if flag[0].endswith("=") else [*flag, folder]
        assert chosen(*words, "--epochs", "3") is expected


def test_pipeline_overrules_what_the_folder_holds(chosen, tmp_path):
    (tmp_path / "train.beton").touch()
    assert chosen("--pipeline", "dali", "-d", tmp_path) is train.DaliTrainOptions
    assert chosen("--pipeline=ffcv") is train.FfcvTrainOptions


def test_an_unknown_pipeline_is_one_line(capsys):
    assert main(["train", "--data", "x", "--pipeline", "tf"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rsnet train: error: ")
    assert "--pipeline" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_run_notes_a_command_that_names_rsnet_train_and_rerun_finds_that_all_is_done(
    photos, tmp_path, capsys
):
    """In a folder whose name is no text."""
    run = tmp_path / os.fsdecode(b"run\xff\n")
    words = ["-d", str(photos), "-c", str(run), *map(str, RUN), "--epochs", "1"]
    assert main(["train", *words]) == 0
    typed, _, command_line = os.fsdecode((run / "command.txt").read_bytes()).partition("\n")
    command = shlex.split(command_line)
    assert typed.startswith("# typed: ")
    assert command[:2] == ["rsnet", "train"]
    config = json.loads((run / "config.json").read_text())
    assert (config["pipeline"], config["output"]) == ("dali", str(run))
    capsys.readouterr()
    assert main(command[1:]) == 0
    assert "epoch 1/1 " not in capsys.readouterr().out


@pytest.mark.parametrize("words", [["-d", "x"], ["-d=x"], ["-dx"], ["--data=x"], ["-dy", "-dx"]])
def test_the_data_is_known_however_it_is_given(words):
    assert train._last_value(words, "--data", "-d") == "x"

"""What verbs say of the data that they are to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsnet.cli.loaders import say_if_trained_on

LINE = (
    "note: the training left --val-fraction 0.2 of these images for validation, and saw the others: give the "
    "same here\n"
)


@pytest.mark.parametrize("data", ["flat", "./flat/", "flat/train", "/flat/train", "linked"])
@pytest.mark.parametrize(
    ("given", "is_said"), [(None, True), (0.1, False), (0.2, False), (0.3, True)]
)
def test_images_that_a_run_has_trained_on_are_not_evaluated_without_a_word(
    data, given, is_said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "linked").symlink_to("flat")
    data = str(tmp_path) + data if data.startswith("/") else data
    say_if_trained_on({"data": "flat", "val_fraction": 0.2}, data, given)
    assert capsys.readouterr().err == (LINE if is_said else "")


@pytest.mark.parametrize(
    ("config", "data"),
    [
        ({"data": "flat", "val_fraction": 0.2}, "other"),
        ({"data": "flat", "val_fraction": 0.2}, "flatter"),
        ({"data": "flat/train", "val_fraction": 0.2}, "flat"),
        ({"data": "flat", "val_fraction": None}, "flat"),
        ({"data": "s3://b/flat", "val_fraction": 0.2}, "s3://b/other"),
        ({}, Path("flat")),
    ],
)
def test_of_other_images_nothing_is_said(config, data, capsys):
    say_if_trained_on(config, data, None)
    assert capsys.readouterr().err == ""


def test_shards_in_object_storage_are_known_by_their_url(capsys):
    say_if_trained_on({"data": "s3://b/flat", "val_fraction": 0.2}, "s3://b/flat", None)
    assert capsys.readouterr().err == LINE

"""`python -m rsnet import` and `export`, and runs on the original's files."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from pipelines.dali import DaliOptions, make_loaders
from rsnet import checkpoint
from rsnet.__main__ import main
from rsnet.models.zoo import build
from rsnet.original import to_original
from rsnet.run import main as train

SIZES = (32, 24)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A file of the original: resnet18, two sizes, three classes."""
    path = tmp_path_factory.mktemp("original") / "model_best.pth.tar"
    torch.manual_seed(0)
    network = {"arch": "parallel_resnet18", "num_classes": 3, "sizes": list(SIZES)}
    model = build("parallel_resnet18", 3, SIZES)
    torch.save(to_original({"network": network, "model": model.state_dict(), "epoch": 1}), path)
    return path


def _train(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["train_dali.py", *map(str, words)])
    return train("train_dali.py", DaliOptions, make_loaders)


def test_an_imported_run_is_evaluated_as_it_was_trained(
    original, photos, tmp_path, monkeypatch, capsys
):
    sizes = map(str, SIZES)
    assert (
        main(["import", str(original), "--output", str(tmp_path / "run"), "--sizes", *sizes]) == 0
    )
    assert "--evaluate --resume" in capsys.readouterr().out
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    assert (
        _train(monkeypatch, "--data", photos, "--evaluate", "--resume", best, "-c", tmp_path / "e")
        == 0
    )
    out = capsys.readouterr().out
    assert "--normalize unit" in out
    assert "--sizes 32 24" in out
    results = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    # The same from the original's file itself.
    direct = ["--data", photos, "--evaluate", "--resume", original, "--sizes", *SIZES]
    assert _train(monkeypatch, *direct, "-c", tmp_path / "d") == 0
    assert json.loads((tmp_path / "d" / "evaluation.json").read_text()) == results


def test_training_goes_on_from_an_originals_file(original, photos, tmp_path, monkeypatch, capsys):
    words = ["--data", photos, "--resume", original, "--sizes", *SIZES, "-b", 8, "--epochs", 2]
    code = _train(
        monkeypatch, *words, "-c", tmp_path / "run", "--wandb", "disabled", "--workers", 1
    )
    out = capsys.readouterr().out
    assert code == 0
    assert "the optimizer starts without momentum" in out
    assert "after epoch 1" in out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["epoch"] == 2
    assert (
        checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["network"]["normalize"]
        == "unit"
    )


def test_export_gives_back_what_was_imported(original, tmp_path, capsys):
    sizes = map(str, SIZES)
    main(["import", str(original), "--output", str(tmp_path / "run"), "--sizes", *sizes])
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert main(["export", str(last), "--output", str(tmp_path / "back.pth.tar")]) == 0
    assert "--arch parallel_resnet18 --sizes 32 24" in capsys.readouterr().out
    before, after = (torch.load(p)["state_dict"] for p in (original, tmp_path / "back.pth.tar"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_nothing_is_overwritten(original, tmp_path, capsys):
    (tmp_path / "back.pth.tar").write_text("mine")
    words = ["import", str(original), "--output", str(tmp_path / "run"), "--sizes", "32", "24"]
    assert main(words) == 0
    assert main(words) == 2
    assert "last.pt exists; give another folder" in capsys.readouterr().err
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert main(["export", str(last), "--output", str(tmp_path / "back.pth.tar")]) == 2
    assert (tmp_path / "back.pth.tar").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import", "ORIGINAL", "--output", "o"], "--sizes: this file was trained for 2 sizes"),
        (["import", "none.pth", "--output", "o"], "there is no checkpoint none.pth"),
        (["import", "--output", "o"], "ORIGINAL.pth.tar"),
        (["improt"], "improt: there is no such verb; one of import export report calibrate"),
    ],
)
def test_a_mistake_is_one_line(original, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(original) if w == "ORIGINAL" else w for w in words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_help_lists_the_verbs(capsys):
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("import", "export", "report", "calibrate"))

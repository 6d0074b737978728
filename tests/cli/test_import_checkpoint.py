"""`python -m rsnet import` and `export`, and runs on the original's files."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from pipelines.dali import DaliOptions, make_loaders
from rsnet.__main__ import main
from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint.authors_pytorch import to_original
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.train import main as train

SIZES = (32, 24)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A file of the original: resnet18, two sizes, three classes."""
    path = tmp_path_factory.mktemp("original") / "model_best.pth.tar"
    torch.manual_seed(0)
    network = {"arch": "parallel_resnet18", "num_classes": 3, "sizes": list(SIZES)}
    model = create_model(ModelConfig("parallel_resnet18", 3, SIZES))
    torch.save(
        to_original(Checkpoint(ModelConfig.from_dict(network), model.state_dict(), epoch=1)), path
    )
    return path


def _train(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["train_dali.py", *map(str, words)])
    return train("train_dali.py", DaliOptions, make_loaders)


@pytest.mark.slow
def test_an_imported_run_is_evaluated_as_it_was_trained(
    original, photos, tmp_path, monkeypatch, capsys
):
    sizes = map(str, SIZES)
    assert (
        main(["import", str(original), "--output", str(tmp_path / "run"), "--sizes", *sizes]) == 0
    )
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    command = f"rsnet train --data DATA --evaluate --resume {best}"
    assert command in capsys.readouterr().out.splitlines()
    assert (
        _train(monkeypatch, "--data", photos, "--evaluate", "--resume", best, "-c", tmp_path / "e")
        == 0
    )
    out = capsys.readouterr().out
    assert "--normalize unit" in out
    assert "--sizes 32 24" in out
    assert f"note: {best} does not name its classes: they are taken to be --data's" in out
    results = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    # The same from the original's file itself.
    direct = ["--data", photos, "--evaluate", "--resume", original, "--sizes", *SIZES]
    assert _train(monkeypatch, *direct, "-c", tmp_path / "d") == 0
    assert json.loads((tmp_path / "d" / "evaluation.json").read_text()) == results


@pytest.mark.slow
def test_training_goes_on_from_an_originals_file(original, photos, tmp_path, monkeypatch, capsys):
    words = ["--data", photos, "--resume", original, "--sizes", *SIZES, "-b", 8, "--epochs", 2]
    code = _train(
        monkeypatch, *words, "-c", tmp_path / "run", "--wandb", "disabled", "--workers", 1
    )
    out = capsys.readouterr().out
    assert code == 0
    assert "no momentum for these weights" in out
    assert "after epoch 1" in out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["epoch"] == 2
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt").network.normalize == "unit"


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
    assert "run holds a run already" in capsys.readouterr().err
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert main(["export", str(last), "--output", str(tmp_path / "back.pth.tar")]) == 2
    assert (tmp_path / "back.pth.tar").read_text() == "mine"


@pytest.mark.slow
def test_an_imported_run_goes_on_and_stays_the_best_until_it_is_beaten(
    original, photos, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    main(["import", str(original), "--output", str(run), "--sizes", *map(str, SIZES)])
    best = checkpoint.load(run / "checkpoints" / "best.pt")
    more = ["--data", photos, "-b", 8, "--wandb", "disabled", "--workers", 1, "-c", run]
    assert _train(monkeypatch, *more, "--arch", "parallel_resnet18", "--sizes", *SIZES) == 2
    assert "holds a run already" in capsys.readouterr().err
    # A rate that makes the network useless.
    worse = ["--resume", run / "checkpoints" / "last.pt", "--lr", 20, "--epochs", 2]
    assert _train(monkeypatch, *more, *worse) == 0
    last = checkpoint.load(run / "checkpoints" / "last.pt")
    assert last.epoch == 2
    assert last.best[0] > 0
    still = checkpoint.load(run / "checkpoints" / "best.pt")
    assert still.best == last.best
    assert all(torch.equal(still.model[name], value) for name, value in best.model.items())


def test_an_exported_file_has_what_the_originals_resume_reads(original):
    """main.py: epoch, best_acc0, best_acc, state_dict, and the optimizer's state dict."""
    content = torch.load(original, weights_only=True)
    assert {"epoch", "arch", "best_acc0", "best_acc", "state_dict", "optimizer"} == content.keys()
    model = create_model(ModelConfig("parallel_resnet18", 3, SIZES))
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    sgd.load_state_dict(content["optimizer"])
    sum(p.sum() for p in model.parameters()).backward()
    sgd.step()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import", "ORIGINAL", "--output", "o"], "--sizes: this file was trained for 2 sizes"),
        (
            ["import", "none.pth", "--output", "o"],
            "there is no run, checkpoint or release none.pth",
        ),
        (["import", "--output", "o"], "ORIGINAL"),
        (["import", "ORIGINAL", "--output", "o", "--sizes", "32", "32"], "all different"),
        (["import", "OURS", "--output", "o"], "this is a checkpoint of this trainer already"),
        (["improt"], "improt: there is no such verb; did you mean import?"),
    ],
)
def test_a_mistake_is_one_line(original, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(
        tmp_path / "ours.pt", Checkpoint(ModelConfig("parallel_resnet18", 2, (32,)), {})
    )
    paths = {"ORIGINAL": str(original), "OURS": "ours.pt"}
    assert main([paths.get(w, w) for w in words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_help_lists_the_verbs(capsys):
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(
        verb in out for verb in ("import", "import-tf", "export", "report", "add-resolution")
    )

"""A resolution that was not trained: three ways to its BatchNorm."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from pipelines.batch import Batch
from pipelines.dali import DaliOptions, make_loaders
from rsnet.__main__ import main
from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.losses import distillation, ensemble_logits
from rsnet.models.factory import create_model
from rsnet.models.state_dict import add_size, neighbour_shares
from rsnet.release.from_run import release_run
from rsnet.train import main as train
from rsnet.training.add_resolution import _Distillation, candidates
from tests.helpers import runs
from tests.helpers.operations import Operations

SIZES = (48, 40, 24)
NETWORK = {
    "arch": "parallel_resnet10",
    "width_mult": 0.125,
    "stem": "small",
    "sizes": list(SIZES),
    "num_classes": 3,
    "classes": ["ant", "bee", "cat"],
    "normalize": "unit",
}


def _model(sizes=SIZES):
    return create_model(ModelConfig("parallel_resnet10", 3, sizes, width_mult=0.125, stem="small"))


def _trained():
    """A network whose BatchNorms differ, as after training."""
    model = _model()
    for layer in model._norms:
        for norm in layer.by_resolution:
            torch.nn.init.normal_(norm.weight, 1, 0.2)
            torch.nn.init.normal_(norm.bias, 0, 0.2)
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.pt"
    torch.manual_seed(0)
    network, config = ModelConfig.from_dict(NETWORK), {"loss": "bce"}
    checkpoint.save(path, Checkpoint(network, _trained().state_dict(), config=config))
    return path


def _calibrate(saved, photos, tmp_path, *more):
    output = tmp_path / "out.pt"
    words = [saved, "--data", photos, "--size", 32, "--output", output]
    words += ["--batch-size", 8, "--steps", 2, *more]
    return main(["calibrate", *map(str, words)]), output


@pytest.mark.parametrize("how", ["interpolate", "estimate", "distil"])
def test_the_chosen_one_is_saved_and_nothing_else_is_changed(saved, photos, tmp_path, capsys, how):
    data, more = photos, []
    if how == "estimate":  # as after a training on images without a split
        data, more = photos / "train", ["--val-fraction", 0.3]
    code, output = _calibrate(saved, data, tmp_path, "--how", how, *more)
    out = capsys.readouterr().out
    assert code == 0
    rows = [line.split()[0] for line in out.partition("\nsize ")[2].splitlines()[1:5]]
    assert rows == ["nearest", "interpolate", "estimate", "distil"]
    assert [line.split()[0] for line in out.splitlines() if line.endswith("saved")] == [how]
    content = checkpoint.load(output)
    assert content.network.sizes == (48, 40, 32, 24)
    assert content.network.calibrated == {"32": how}
    assert content.loss == "bce"  # for the next size
    before = checkpoint.load(saved).model
    expected = add_size(before, SIZES, 32, neighbour_shares(SIZES, 32))
    changed = {k.rsplit(".", 1)[1] for k, v in expected.items() if not v.equal(content.model[k])}
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert (
        changed
        == {
            "interpolate": set(),
            "estimate": statistics,
            "distil": statistics | {"weight", "bias"},
        }[how]
    )
    of_the_new = [k for k, v in expected.items() if not v.equal(content.model[k])]
    assert all(".by_resolution.2." in k for k in of_the_new)


def test_the_new_size_is_distilled_by_the_loss_of_the_training(monkeypatch):
    """A file whose options are not known is of cross-entropy."""
    losses = []

    def noted(*given, loss):
        losses.append(loss)
        return distillation(*given, loss=loss)

    monkeypatch.setattr("rsnet.training.add_resolution.distillation", noted)
    network, weights = ModelConfig.from_dict(NETWORK), _trained().state_dict()
    images = tuple(torch.randn(2, 3, size, size) for size in (48, 40, 32, 24))
    for config in ({"loss": "bce"}, {}):
        trained = Checkpoint(network, weights, config=config)
        candidates(trained, 32, [Batch(images, torch.zeros(2))], torch.device("cpu"))
    assert losses == ["bce", "ce"]


def test_a_step_of_the_distillation_indexes_by_no_list():
    """What lies on the host is copied to a GPU, which waits for it."""
    model = _trained()
    torch.nn.init.normal_(model.alpha)
    large, new, small = (torch.randn(2, 3, size, size) for size in SIZES)
    objective = _Distillation(model, 40).train()
    with Operations() as operations:
        terms = objective((large, new, small), torch.zeros(2))
    assert not {"index", "nonzero"} & {*operations.count}
    teacher = ensemble_logits([model(large), model(small)], model.alpha[::2])
    student = model(new)
    assert torch.equal(terms["total"], distillation([student], teacher, "ens"))


def test_estimated_statistics_are_the_mean_over_batches(saved, photos, tmp_path):
    """Of the first layer, whose input does not depend on other statistics, written out."""
    from pipelines.batch import LoaderSpec

    _, output = _calibrate(saved, photos, tmp_path, "--how", "estimate")
    state = checkpoint.load(output).model
    spec = LoaderSpec(photos, (48, 40, 32, 24), 8, torch.device("cpu"), normalize="unit")
    loader = make_loaders(DaliOptions(), spec, True).train
    model = _model()
    model.load_state_dict(checkpoint.load(saved).model)
    outputs = [model.network.conv1(batch.images[2]) for batch, _ in zip(loader, range(2))]  # noqa: B905
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(
        state["network.bn1.by_resolution.2.running_mean"], mean, rtol=1e-4, atol=1e-5
    )
    loader.close()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "40"], "--size 40: .*best.pt has it already"),
        (["--size", "0"], "--size 0: at least 1"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--size", "3"], "--size 3: --sizes: 3 is too small"),
        (["--seed", "-1"], "--seed -1: at least 0"),
        (["--lr", "inf"], "--lr inf: must be a positive number"),
        (["--val-fraction", "30"], "--val-fraction 30: a share above 0 and below 1"),
        (["--output", "/dev/null/out.pt"], "--output: cannot write into /dev/null"),
    ],
)
def test_a_mistake_is_one_line(saved, photos, tmp_path, capsys, more, message):
    code, output = _calibrate(saved, photos, tmp_path, *more)
    err = capsys.readouterr().err
    assert code == 2
    assert re.search(message, err)
    assert err.count("\n") == 1
    assert not output.exists()


def test_a_quantized_release_is_sent_back_to_its_run(tmp_path, capsys):
    network = runs.NETWORK | {"mode": "preact", "qw": 2, "qa": 2}
    release_run(runs.write_run(tmp_path / "run", network), tmp_path / "release")
    assert main(["add-resolution", str(tmp_path / "release"), "--size", "40", "-d", "x"]) == 2
    line = (
        "release: a release has the values of its 2-bit weights alone; give its run or checkpoint"
    )
    assert line in capsys.readouterr().err


def test_the_former_name_of_the_argument_is_said_to_be_one(capsys):
    words = ["--checkpoint", "none.pt", "--size", "40", "--data", "x"]
    for given in (words, ["--checkpoint=none.pt", *words[2:]]):
        assert main(["calibrate", *given]) == 2
        note, error = capsys.readouterr().err.splitlines()
        assert note == "note: --checkpoint is now an argument without a name"
        assert error.endswith("error: there is no run, checkpoint or release none.pt")


def test_an_existing_file_is_not_overwritten(saved, photos, tmp_path, capsys):
    (tmp_path / "out.pt").write_text("mine")
    code, output = _calibrate(saved, photos, tmp_path)
    assert code == 2
    assert "out.pt exists; give another name" in capsys.readouterr().err
    assert output.read_text() == "mine"


@pytest.mark.slow
def test_a_calibrated_network_can_be_trained_on(saved, photos, tmp_path, monkeypatch, capsys):
    """As a run of its own; its new size joins the ensemble, whose weight was 0."""
    run = tmp_path / "runs" / "checkpoints"
    run.mkdir(parents=True)
    (run / "best.pt").write_bytes(saved.read_bytes())
    _calibrate(saved, photos, tmp_path, "--how", "estimate", "--output", run / "out.pt")
    words = f"train --data {photos} --resume {run / 'out.pt'} -b 8 --epochs 1 --amp off --lr 0.001"
    words += " --workers 1 --wandb disabled --ema 0.5 --output "
    monkeypatch.setattr(sys, "argv", [*words.split(), str(tmp_path / "runs")])
    assert train("train", DaliOptions, make_loaders) == 2  # it is no continuation of that run
    assert "holds a run already" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words.split(), str(tmp_path / "next")])
    assert train("train", DaliOptions, make_loaders) == 0
    content = checkpoint.load(tmp_path / "next" / "checkpoints" / "last.pt")
    assert content.network.sizes == (48, 40, 32, 24)
    for key in ("model", "ema"):
        alpha = getattr(content, key)["alpha"]
        torch.testing.assert_close(alpha, torch.ones(4), rtol=0, atol=0.01)
        assert not torch.equal(alpha, torch.ones(4))


def test_distilled_statistics_are_running_means_whatever_was_estimated_before():
    torch.manual_seed(0)
    network, model = ModelConfig.from_dict(NETWORK), _trained()
    sizes = (48, 40, 32, 24)
    batches = [
        Batch(tuple(torch.randn(2, 3, s, s) for s in sizes), torch.zeros(2)) for _ in range(2)
    ]
    found = candidates(Checkpoint(network, model.state_dict()), 32, batches, torch.device("cpu"))
    key = "network.bn1.by_resolution.2.running_mean"
    mean = found["interpolate"][key]
    for batch in batches:
        mean = 0.9 * mean + 0.1 * model.network.conv1(batch.images[2]).mean((0, 2, 3))
    torch.testing.assert_close(found["distil"][key], mean.detach())

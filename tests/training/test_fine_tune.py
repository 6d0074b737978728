"""Starting from trained weights: of runs, checkpoints, releases, the original's files; and what is frozen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pipelines.synthetic import SyntheticOptions, make_loaders
from pipelines.utils.errors import UsageError
from rsnet.checkpoint import io
from rsnet.checkpoint.authors_pytorch import to_original
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import classifier_names, create_model
from rsnet.release.from_run import release_run
from rsnet.train import main
from rsnet.training.fine_tune import freeze, read_switchable, start_from
from tests.helpers.runs import trained

SIZES = (64, 48, 32)
SMALL = {"width_mult": 0.125, "classes": ("ant", "bee", "cat")}


def _config(num_classes=3, sizes=SIZES, **changes) -> ModelConfig:
    return ModelConfig("parallel_resnet10", num_classes, sizes, **SMALL | changes)


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return Checkpoint(_config(), trained(_config().to_dict(), 1))


def _write(kind: str, checkpoint: Checkpoint, folder: Path) -> Path:
    run = folder / "run"
    best = run / "checkpoints" / "best.pt"
    io.save(best, checkpoint)
    if kind.startswith("release"):
        release_run(run, folder / "release")
    paths = {
        "run": run,
        "checkpoint": best,
        "release": folder / "release",
        "release's weights": folder / "release" / "model.safetensors",
    }
    return paths[kind]


@pytest.mark.parametrize(
    "kind",
    ["run", "checkpoint", "release's weights", pytest.param("release", marks=pytest.mark.slow)],
)
def test_every_size_starts_as_it_was_trained_whatever_holds_it(source, tmp_path, kind):
    found = read_switchable(str(_write(kind, source, tmp_path)), None, None)
    assert found is not None
    model = create_model(_config())
    assert start_from(model, _config(), found, "it") == []
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, source.model[name]), name


@pytest.mark.slow  # a ResNet-18 at its five sizes
def test_a_file_of_the_original_is_one_of_its_sizes(tmp_path):
    config = ModelConfig("parallel_resnet18", 3, (224, 192, 160, 128, 96))
    state = trained(config.to_dict(), 1)
    torch.save(to_original(Checkpoint(config, state)), tmp_path / "model_best.pth.tar")
    found = read_switchable(str(tmp_path / "model_best.pth.tar"), None, (96, 64))
    assert found is not None
    assert found.network.sizes == config.sizes
    assert found.network.normalize == "unit"
    assert torch.equal(
        found.model["network.bn1.by_resolution.4.weight"],
        state["network.bn1.by_resolution.4.weight"],
    )


@pytest.mark.parametrize("pretrained", ["default", "IMAGENET1K_V1"])
def test_a_librarys_weights_are_no_file(pretrained):
    assert read_switchable(pretrained, None, None) is None


def test_an_ordinary_file_is_none_of_ours(tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "plain.pth")
    assert read_switchable(str(tmp_path / "plain.pth"), None, None) is None


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        (_config(5, classes=tuple("abcde")), "3 classes there, 5 here"),
        (_config(3, classes=tuple("abc")), "the classes have other names"),
    ],
)
def test_the_classifier_of_other_classes_starts_anew_and_all_else_is_taken(source, wanted, line):
    model = create_model(wanted)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (note,) = start_from(model, wanted, source, "it")
    assert note == f"--pretrained: it: the classifier starts anew: {line}"
    for name, value in model.state_dict().items():
        expected = before if name.startswith("network.fc.") else source.model
        assert torch.equal(value, expected[name]), name


def test_the_classifier_of_a_network_without_class_names_is_kept_and_that_is_said(source):
    unnamed = dataclasses.replace(source, network=_config(classes=()))
    model = create_model(_config())
    (note,) = start_from(model, _config(), unnamed, "it")
    assert note == (
        "--pretrained: it: it does not name its classes: they are taken to be --data's, in their order"
    )
    assert torch.equal(model.state_dict()["network.fc.weight"], source.model["network.fc.weight"])


def test_batchnorm_of_other_sizes_is_that_of_the_nearest_which_is_said(source):
    wanted = _config(sizes=(80, 64, 40, 32))
    model = create_model(wanted)
    (note,) = start_from(model, wanted, source, "it")
    assert note.endswith(
        "BatchNorm of sizes that it was not trained for: 80 from 64's, 40 from 48's"
    )
    for place, there in enumerate((0, 0, 1, 2)):
        norm = model.network.layer2[0].bn1.by_resolution[place]
        expected = source.model[f"network.layer2.0.bn1.by_resolution.{there}.running_var"]
        assert torch.equal(norm.running_var, expected)
    known = source.model["alpha"][[0, 2]]
    mean = known.mean()
    expected = torch.stack([mean, known[0], mean, known[1]])
    torch.testing.assert_close(model.alpha.detach(), expected)


@pytest.mark.slow
def test_what_the_classes_decide_is_found_in_networks_of_all_kinds():
    def names(arch: str) -> frozenset[str]:
        return classifier_names(ModelConfig(arch, 7, (64,)))

    assert names("parallel_resnet18") == {"fc.weight", "fc.bias"}
    assert names("parallel_mobilenetv2") == {"classifier.1.weight", "classifier.1.bias"}
    assert names("parallel_densenet121") == {"classifier.weight", "classifier.bias"}
    # A convolution; two heads behind a BatchNorm, of which distillation needs one.
    assert names("parallel_timm/dpn48b") == {"classifier.weight", "classifier.bias"}
    heads = {
        f"{head}.linear.{leaf}" for head in ("head", "head_dist") for leaf in ("weight", "bias")
    }
    assert names("parallel_timm/levit_128s") == heads


@pytest.mark.parametrize(
    ("what", "learning"),
    [
        ("none", {"conv1", "layer1", "layer2", "layer3", "layer4", "fc"}),
        ("backbone", {"fc"}),
        ("layer2", {"layer3", "layer4", "fc"}),
        ("layer1.0.conv1", {"layer1", "layer2", "layer3", "layer4", "fc"}),
    ],
)
def test_what_is_frozen_does_not_learn_and_batchnorm_always_does(what, learning):
    model = create_model(_config())
    freeze(model, what, _config())
    shared = {n: p for n, p in model.network.named_parameters() if "by_resolution" not in n}
    private = [p for n, p in model.named_parameters() if "by_resolution" in n]
    assert {name.split(".")[0] for name, p in shared.items() if p.requires_grad} == learning
    assert all(p.requires_grad for p in (*private, model.alpha))


def test_a_layer_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(UsageError, match=r"--freeze layer9: .* there are conv1 layer1 .* fc"):
        freeze(create_model(_config()), "layer9", _config())


def test_a_run_is_tuned_to_other_classes_and_sizes_by_its_directory_alone(
    source, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    _write("run", source, tmp_path)
    words = [
        "--data", "none", "--pretrained", "./run", "--freeze", "backbone", "--sizes", "48", "40",
        "-b", "4", "--epochs", "1", "--lr", "0.1", "--amp", "off", "--device", "cpu", "--wandb", "disabled",
        "--train-images", "8", "--val-images", "4", "--classes", "5", "--output", "tuned",
    ]  # fmt: skip
    assert main("rsnet train", SyntheticOptions, make_loaders, words) == 0
    out = capsys.readouterr().out
    assert "--pretrained: ./run: the classifier starts anew: 3 classes there, 5 here" in out
    assert "40 from 48's" in out
    tuned = io.load(Path("tuned/checkpoints/last.pt"))
    assert (tuned.network.arch, tuned.network.width_mult) == ("parallel_resnet10", 0.125)
    shared = "network.layer1.0.conv1.weight"
    assert torch.equal(tuned.model[shared], source.model[shared])
    norm = "network.bn1.by_resolution.{}.weight"
    assert not torch.equal(tuned.model[norm.format(0)], source.model[norm.format(1)])
    # The same command goes on, also without what it started from.
    for source_is_there in (True, False):
        if not source_is_there:
            Path("run").rename("moved")
        assert main("rsnet train", SyntheticOptions, make_loaders, words) == 0
        assert "tuned: already finished after 1 epochs" in capsys.readouterr().out
    # Weights that it did not start from are not taken, and that is refused.
    other = [*words, "--pretrained", "moved", "--resume", "auto", "--epochs", "2"]
    assert main("rsnet train", SyntheticOptions, make_loaders, other) == 2
    assert "--pretrained moved: --resume goes on with the weights in" in capsys.readouterr().err
    classes = [*words, "--resume", "auto", "--classes", "6"]
    assert main("rsnet train", SyntheticOptions, make_loaders, classes) == 2
    assert "--data has 6 classes, the network to resume has 5" in capsys.readouterr().err
    more = ["--resume", "auto", "--epochs", "2"]
    again = [w for w in words if w not in ("--pretrained", "./run")]
    assert main("rsnet train", SyntheticOptions, make_loaders, [*again, *more]) == 0
    again_tuned = io.load(Path("tuned/checkpoints/last.pt"))
    assert again_tuned.epoch == 2
    assert torch.equal(again_tuned.model[shared], source.model[shared])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--freeze", "backbone"], "--freeze backbone: there is nothing to keep without --pretrained"),
        (["--pretrained", "."], "--pretrained: . holds neither a run with checkpoints/best.pt nor a"),
        (["--pretrained", "./none.pt"], "--pretrained: there is no run, checkpoint or release none.pt"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    line = ["--data", "none", "--arch", "parallel_resnet10", "--sizes", "32", *words]
    assert main("rsnet train", SyntheticOptions, make_loaders, line) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1

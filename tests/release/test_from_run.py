"""What of a run or a checkpoint is released."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from rsnet.__main__ import main
from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint.authors_pytorch import to_original
from rsnet.checkpoint.checkpoint import BEST_BY, Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.evaluation.class_names import imagenet_ids
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.release import package as release
from rsnet.release.from_run import released
from rsnet.release.source import open_source
from tests.helpers.runs import (
    NETWORK,
    SIZES,
    assert_same_logits,
    read_config,
    reference,
    trained,
    write_run,
)


def test_the_averaged_weights_are_released_where_there_are_some(tmp_path, capsys):
    run = write_run(tmp_path / "run", ema=trained(NETWORK, 2))
    best = run / "checkpoints" / "best.pt"
    assert main(["release", str(best), "--output", str(tmp_path / "release")]) == 0
    taken, *_ = capsys.readouterr().out.splitlines()
    assert taken.startswith(f"checkpoint {best}: ")
    assert taken.endswith(", averaged weights after epoch 2")
    assert_same_logits(release.load(tmp_path / "release"), reference(checkpoint.load(best)))
    assert read_config(tmp_path / "release")["weights"]["averaged"] is True


def test_a_size_that_was_added_is_released_with_its_weight_of_0(tmp_path, capsys):
    config = ModelConfig.from_dict(NETWORK | {"calibrated": {"48": "distil"}})
    state = trained(NETWORK, 1)
    state["alpha"][1] = -torch.inf
    checkpoint.save(tmp_path / "best-48.pt", Checkpoint(config, state))
    words = [str(tmp_path / "best-48.pt"), "--output", str(tmp_path / "release")]
    assert main(["release", *words]) == 0, capsys.readouterr().err
    model = release.load(tmp_path / "release")
    assert model.ensemble_weights()[1] == 0
    assert_same_logits(model, reference(checkpoint.load(tmp_path / "best-48.pt")))
    card = (tmp_path / "release" / "README.md").read_text()
    assert "Added after the training, without weight in the ensemble: 48." in card


def test_an_added_size_has_no_share_in_an_originals_file_either():
    network = {"arch": "parallel_resnet18", "num_classes": 3, "sizes": [64, 48, 32]}
    state = trained(network, 3)
    state["alpha"] = torch.tensor([1.0, -torch.inf, 0.5])
    alpha = to_original(Checkpoint(ModelConfig.from_dict(network), state))["state_dict"][
        "module.alpha"
    ]
    assert alpha.isfinite().all()  # weight decay makes NaN of -inf
    assert torch.equal(alpha.softmax(0), state["alpha"].softmax(0))


@pytest.mark.slow
def test_a_file_of_the_original_is_released(tmp_path, capsys):
    sizes = [224, 192, 160, 128, 96]
    network = {"arch": "parallel_resnet18", "num_classes": 3, "sizes": sizes}
    found = Checkpoint(ModelConfig.from_dict(network), trained(network, 3), epoch=5)
    torch.save(to_original(found), tmp_path / "model_best.pth.tar")
    words = [str(tmp_path / "model_best.pth.tar"), "--output", str(tmp_path / "release")]
    assert main(["release", *words]) == 0
    said = capsys.readouterr().out
    assert "after epoch 5" in said
    assert "does not say its sizes; 224 192 160 128 96 is assumed" in said
    content = release.read(tmp_path / "release")
    config, state = content.config, content.state
    assert state.keys() == found.model.keys()
    assert all(torch.equal(v, state[n]) for n, v in found.model.items() if v.is_floating_point())
    assert config["network"]["classes"] == []
    assert config["preprocessing"]["std"] == [1.0, 1.0, 1.0]


def test_what_an_early_checkpoint_does_not_say_is_filled_in(tmp_path):
    late = ("width_mult", "stem", "norm", "blurpool")
    network = {k: v for k, v in NETWORK.items() if k not in late}
    run = write_run(tmp_path / "run", network)
    assert main(["release", str(run), "--output", str(tmp_path / "release")]) == 0
    assert read_config(tmp_path / "release")["network"] == NETWORK | {"width_mult": 1.0}


def test_the_config_has_what_the_network_costs(run, folder):
    config = read_config(folder)
    model = reference(checkpoint.load(run / "checkpoints" / "best.pt"))
    for size in SIZES:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, size, size))
        assert config["gmacs"][str(size)] == pytest.approx(counter.get_total_flops() / 2e9)
    assert config["gmacs"]["ensemble"] == pytest.approx(sum(config["gmacs"][str(s)] for s in SIZES))
    assert sum(config["parameters"].values()) == sum(p.numel() for p in model.parameters())


def test_the_accuracies_are_those_of_the_checkpoints_epoch(folder):
    assert read_config(folder)["accuracy"] == {
        "64": {"top1": 20.0, "top5": 52.0},
        "48": {"top1": 21.0, "top5": 53.0},
        "32": {"top1": 22.0, "top5": 54.0},
        "ensemble": {"top1": 23.0, "top5": 55.0},
    }


def test_the_accuracies_of_the_best_are_of_its_score_if_its_epoch_was_trained_again(tmp_path):
    """From a checkpoint before it; what was logged first is set aside, and was better."""
    run = write_run(tmp_path / "run", best=[20.0, 36.5], best_by=BEST_BY)
    (run / "metrics.jsonl").rename(run / "metrics.abandoned.jsonl")
    text = (run / "metrics.abandoned.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"val/top1@64": 20.0', '"val/top1@64": 19.0'))
    best = open_source(run)
    assert released(best).config["accuracy"]["64"] == {"top1": 20.0, "top5": 52.0}
    (run / "metrics.abandoned.jsonl").unlink()
    assert released(best).config["accuracy"] is None


@pytest.mark.parametrize("case", ["within an epoch", "no evaluation", "no run directory"])
def test_weights_that_were_not_evaluated_have_no_accuracies(tmp_path, capsys, case):
    run = write_run(tmp_path / "run", done=3 if case == "within an epoch" else 0)
    path = run / "checkpoints" / "best.pt"
    if case == "no evaluation":
        (run / "metrics.jsonl").write_text('{"step": 10, "epoch": 2.0, "train/total": 1.0}\n')
    if case == "no run directory":
        (run / "copies").mkdir()
        path = path.rename(run / "copies" / "best.pt")
    assert main(["release", str(path), "--output", str(tmp_path / "release")]) == 0
    assert "note: their accuracies are not known" in capsys.readouterr().out
    assert release.read(tmp_path / "release").config["accuracy"] is None
    card = (tmp_path / "release" / "README.md").read_text()
    assert "| 64 |  |  | 0." in card
    assert "accuracies are not known" in card


def test_readable_names_of_a_file_are_released_and_what_predictions_have(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    names = ["Formica", "Apis", "Felis"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    words = ["--output", str(tmp_path / "release"), "--class-names", str(tmp_path / "names.txt")]
    assert main(["release", str(run), *words]) == 0, capsys.readouterr().err
    assert read_config(tmp_path / "release")["class_names"] == names
    assert read_config(tmp_path / "release")["network"]["classes"] == ["ant", "bee", "cat"]
    black = np.zeros((64, 64, 3), np.uint8)
    (named,) = SwitchableClassifier.load(tmp_path / "release").classify(black)
    assert sorted(named.classes) == sorted(names)
    assert main(["release", str(tmp_path / "release"), "--output", str(tmp_path / "copy")]) == 0
    assert read_config(tmp_path / "copy") == read_config(tmp_path / "release")


def test_a_release_that_is_copied_can_be_given_names(tmp_path):
    run = write_run(tmp_path / "run")
    assert main(["release", str(run), "--output", str(tmp_path / "release")]) == 0
    before = read_config(tmp_path / "release")
    assert "class_names" not in before
    (tmp_path / "names.json").write_text('{"cat": "Felis", "ant": "Formica", "bee": "Apis"}')
    words = ["--output", str(tmp_path / "copy"), "--class-names", str(tmp_path / "names.json")]
    assert main(["release", str(tmp_path / "release"), *words]) == 0
    assert read_config(tmp_path / "copy") == before | {"class_names": ["Formica", "Apis", "Felis"]}


def test_imagenets_ids_are_named_without_a_file(tmp_path):
    pytest.importorskip("timm")
    network = NETWORK | {"num_classes": 1000, "classes": list(imagenet_ids()), "sizes": [32]}
    names = released(open_source(write_run(tmp_path / "run", network))).config["class_names"]
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet tissue")


def test_what_was_tuned_of_a_run_is_released_with_its_weights_alone(tmp_path):
    run = write_run(tmp_path / "run")
    sha256 = released(open_source(run)).config["weights"]["sha256"]
    for name, content, is_taken in (
        ("other", {"sha256": "0" * 64}, False),
        ("broken", [], False),
        ("own", {"sha256": sha256, "any": 1}, True),
    ):
        (run / "tuned.json").write_text(json.dumps(content))
        assert main(["release", str(run), "--output", str(tmp_path / name)]) == 0
        found = tmp_path / name / "tuned.json"
        assert found.exists() == is_taken
    assert json.loads(found.read_text()) == {"sha256": sha256, "any": 1}


def test_weights_that_are_not_finite_are_neither_classified_with_nor_released(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    best = run / "checkpoints" / "best.pt"
    broken = checkpoint.load(best)
    broken.model["network.conv1.weight"][0, 0, 0, 0] = torch.nan
    checkpoint.save(best, broken)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for words in (
        ["predict", str(run), str(tmp_path / "a.png")],
        ["release", str(run), "--output", "x"],
    ):
        assert main(words) == 1
        assert "network.conv1.weight has numbers that are not finite" in capsys.readouterr().err

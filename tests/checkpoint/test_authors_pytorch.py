"""Checkpoint files of the original implementation, made from the parity formulas."""

from __future__ import annotations

import dataclasses
import re
from functools import cache

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from pipelines.dali import DaliOptions
from pipelines.utils.errors import DataError, UsageError
from rsnet.checkpoint import io as checkpoint
from rsnet.checkpoint.authors_optimizer import weight_decay
from rsnet.checkpoint.authors_pytorch import ARCHS, assumed_sizes, from_original, to_original
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.checkpoint.weights import load_weights
from rsnet.config.command_line import parse
from rsnet.config.model_config import ModelConfig
from rsnet.models.factory import create_model
from rsnet.training.optim import load_optimizer_state, make_sgd
from rsnet.training.resume import find_start
from tests.helpers import parity

SIZES = (64, 56, 48, 40, 32)
PARITY_ARCHS = ["parallel_resnet18", "parallel_resnet50", "parallel_mobilenetv2"]


@cache
def _state(arch: str) -> dict:
    keys = parity.numbers(arch)["keys"]
    counts = {k: torch.tensor(7) for k in keys if k.endswith("num_batches_tracked")}
    return parity.state_of(keys) | counts


def _file(arch: str, parallel: bool = True) -> dict:
    """What the original saves."""
    state = _state(arch)
    prefix = "module." if parallel else ""
    return {
        "epoch": 120,
        "arch": arch,
        "state_dict": {prefix + k: v for k, v in state.items()},
        "best_acc0": np.float64(73.1),
        "best_acc": torch.tensor(69.8),
        "optimizer": {"state": {}, "param_groups": []},
    }


@cache
def _checkpoint(arch: str, sizes: tuple[int, ...]) -> Checkpoint:
    """A checkpoint of ours, without the numbers."""
    with torch.device("meta"):
        model = create_model(ModelConfig(arch, 10, sizes))
    return Checkpoint(ModelConfig(arch, 10, sizes), model.state_dict())


def _logits_error(model, arch):
    with torch.no_grad():
        logits = model.forward_all(parity.images(arch))
    errors = []
    for size, z in zip(model.sizes, logits, strict=True):
        theirs = torch.tensor(parity.numbers(arch)["eval_logits"][str(size)]).reshape(z.shape)
        errors.append((z - theirs).abs().max() / theirs.abs().max())
    return max(errors).item()


@pytest.mark.parametrize(
    ("arch", "parallel"),
    [
        *(pytest.param(a, True, marks=pytest.mark.slow if "50" in a else ()) for a in PARITY_ARCHS),
        ("parallel_resnet18", False),
    ],
)
def test_an_originals_file_gives_the_originals_logits(tmp_path, arch, parallel):
    torch.save(_file(arch, parallel), tmp_path / "model.pth.tar")
    loaded = checkpoint.load(tmp_path / "model.pth.tar", sizes=SIZES)
    assert loaded.network == ModelConfig(arch, 10, SIZES, normalize="unit")
    assert (loaded.epoch, loaded.of_authors) == (120, True)
    model = create_model(ModelConfig(arch, 10, SIZES)).eval()
    load_weights(model, loaded.model, SIZES)
    assert _logits_error(model, arch) < 2e-6


def test_the_names_are_the_originals():
    """Against the lists of names and shapes that were read from the original networks."""
    for arch in PARITY_ARCHS:
        ours = to_original(_checkpoint(arch, SIZES))["state_dict"]
        theirs = parity.numbers(arch)["keys"]
        assert {k: list(v.shape) for k, v in ours.items()} == {
            f"module.{k}": shape for k, shape in theirs.items()
        }


@pytest.mark.parametrize(
    "arch", ["parallel_resnet18", pytest.param("parallel_mobilenetv2", marks=pytest.mark.slow)]
)
def test_an_exported_file_is_the_imported_one(arch):
    file = _file(arch)
    back = to_original(from_original(file, sizes=SIZES))
    assert (back["arch"], back["epoch"]) == (arch, 120)
    assert set(back["state_dict"]) == set(file["state_dict"])
    for key, value in file["state_dict"].items():
        assert torch.equal(back["state_dict"][key], value), key


def _their_parameters(copies: int) -> list[str]:
    """The original's parameters in its order: alpha was registered on the network itself, and each layer of
    torchvision's ResNet-18 holds its copies."""
    names = ["alpha"]
    for name, module in torchvision.models.resnet18().named_modules():
        if isinstance(module, nn.BatchNorm2d):
            names += [f"{name}.bn_{i}.{leaf}" for i in range(copies) for leaf in ("weight", "bias")]
        elif isinstance(module, nn.Conv2d | nn.Linear):
            names += [f"{name}.module.{leaf}" for leaf, _ in module.named_parameters()]
    return names


@pytest.mark.parametrize("order", [(48, 32), (32, 48)])
def test_momentum_and_weight_decay_go_there_and_back(order):
    config = ModelConfig("parallel_resnet18", 3, (48, 32))
    model = create_model(config)
    file = to_original(Checkpoint(config, model.state_dict()))
    names = _their_parameters(2)
    state = {k.removeprefix("module."): v for k, v in file["state_dict"].items()}
    momentum = {name: torch.rand(state[name].shape) for name in names}
    optimizer = {
        "state": {i: {"momentum_buffer": momentum[name]} for i, name in enumerate(names)},
        "param_groups": [{"params": list(range(len(names))), "lr": 0.1, "weight_decay": 5e-4}],
    }
    found = from_original(file | {"optimizer": optimizer}, sizes=order)
    assert weight_decay(found) == 5e-4
    sgd = make_sgd(model, 0.1, 0.9, 1e-4)
    assert load_optimizer_state(sgd, found.optimizer)
    ours = {name: sgd.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    first = order.index(48)  # the original's copy of our first BatchNorm
    norm = "layer1.1.bn2.bn_{}.bias"
    assert torch.equal(ours["network.conv1.weight"], momentum["conv1.module.weight"])
    assert torch.equal(
        ours["network.layer1.1.bn2.by_resolution.0.bias"], momentum[norm.format(first)]
    )
    assert torch.equal(ours["alpha"], momentum["alpha"][[first, 1 - first]])
    back = to_original(found)["optimizer"]
    assert back["param_groups"][0]["weight_decay"] == 5e-4
    if order == (48, 32):
        for i, name in enumerate(names):
            assert torch.equal(back["state"][i]["momentum_buffer"], momentum[name]), name


@pytest.mark.parametrize(
    "optimizer",
    [None, [], {}, {"state": {}, "param_groups": []}, {"state": [], "param_groups": [{"params": [0]}]},
     {"state": {0: {"momentum_buffer": torch.zeros(1)}}, "param_groups": [{"params": [0]}]}],
)  # fmt: skip
def test_an_optimizer_without_all_momentum_is_none(optimizer):
    file = _file("parallel_resnet18") | {"optimizer": optimizer}
    assert from_original(file, sizes=SIZES).optimizer is None


def test_weight_decay_that_is_not_known_is_the_papers_and_averages_have_no_momentum():
    ours = _checkpoint("parallel_mobilenetv2", (64, 32))
    (group,) = to_original(ours)["optimizer"]["param_groups"]
    assert group["weight_decay"] == 4e-5
    run = dataclasses.replace(
        ours, config={"weight_decay": 0.3, "lr": 0.2}, ema=ours.model, optimizer={"state": {}}
    )
    written = to_original(run)["optimizer"]
    assert written["state"] == {}
    assert (written["param_groups"][0]["weight_decay"], written["param_groups"][0]["lr"]) == (
        0.3,
        0.2,
    )


def test_batchnorms_belong_to_the_sizes_in_the_order_in_which_they_were_given():
    """`bn_i` is of the i-th entry of the original's --sizes, which need not be sorted."""
    arch, order = "parallel_resnet18", (40, 64, 32, 56, 48)
    file = _file(arch)
    place = {s: i for i, s in enumerate(order)}
    state = {}
    for key, value in file["state_dict"].items():
        size = SIZES[int(m[1])] if (m := re.search(r"\.bn_(\d)\.", key)) else None
        state[re.sub(r"\.bn_\d\.", f".bn_{place[size]}.", key) if size else key] = value
    state["module.alpha"] = file["state_dict"]["module.alpha"][[SIZES.index(s) for s in order]]
    sorted_, shuffled = (
        from_original(f, sizes=s) for f, s in ((file, SIZES), (file | {"state_dict": state}, order))
    )
    assert sorted_.network == shuffled.network
    for key, value in sorted_.model.items():
        assert torch.equal(shuffled.model[key], value), key


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=pytest.mark.slow if "t1" in a else ()) for a in ARCHS]
)
def test_every_network_of_the_original_is_mapped_without_a_clash(arch):
    ours = _checkpoint(arch, (64, 32))
    state = to_original(ours)["state_dict"]
    assert len(state) == len(ours.model)
    leaf = r"(module\.(weight|bias)|bn_[01]\.(weight|bias|running_mean|running_var|num_batches_tracked))"
    wrong = [
        k for k in state if k != "module.alpha" and not re.fullmatch(rf"module\.[\w.]+\.{leaf}", k)
    ]
    assert not wrong
    again = from_original({"arch": arch, "state_dict": state}, sizes=(64, 32)).model
    assert set(again) == set(ours.model)


def test_a_plain_state_dict_needs_the_arch():
    state = _file("parallel_resnet18")["state_dict"]
    with pytest.raises(UsageError, match="--arch: this file does not say which network"):
        from_original(state, sizes=SIZES)
    assert from_original(state, "parallel_resnet18", SIZES).network.num_classes == 10


def test_other_sizes_than_the_files_are_asked_for():
    with pytest.raises(UsageError, match="--sizes: this file was trained for 5 sizes"):
        from_original(_file("parallel_resnet18"), sizes=(64, 32))


def test_sizes_that_are_assumed_are_said(tmp_path):
    path = tmp_path / "model_best.pth.tar"
    torch.save(_file("parallel_resnet18"), path)
    said: list[str] = []
    for sizes in ([], ["--sizes", *map(str, SIZES)]):
        words = ["--data", "d", "--evaluate", "--resume", str(path), *sizes]
        find_start(parse(DaliOptions, words)[0], said.append)
    taken, note, again = said
    for line, its in ((taken, "224 192 160 128 96"), (again, " ".join(map(str, SIZES)))):
        about = f"parallel_resnet18, sizes {its}, weights after epoch 120"
        assert line == f"--resume: file of the original code {path}: {about}"
    assert note.startswith(f"note: {path} does not say its sizes; 224 192 160 128 96 is assumed")
    # The sizes of a training that starts from it are not the file's.
    start = assumed_sizes(path, checkpoint.load(path).network, is_start=True)
    assert "first make a run of it by rsnet import with its --sizes" in start


def test_what_does_not_fit_is_listed_by_name_and_shape():
    file = _file("parallel_resnet18", parallel=False)
    state = file["state_dict"]  # a copy
    state["conv1.module.weight"] = torch.zeros(64, 3, 5, 5)
    state["extra.module.weight"] = torch.zeros(3)
    del state["layer1.0.bn1.bn_2.bias"]
    with pytest.raises(DataError) as error:
        from_original(file, sizes=SIZES)
    for part in (
        "layer1.0.bn1.bn_2.bias (64,) is missing",
        "extra.module.weight (3,) is unknown",
        "conv1.module.weight is (64, 3, 5, 5), not (64, 3, 7, 7)",
    ):
        assert part in str(error.value)
    with pytest.raises(DataError, match=r"do not fit parallel_resnet50: .*; and \d+ more"):
        from_original(_file("parallel_resnet18"), "parallel_resnet50", SIZES)


@pytest.mark.parametrize(
    "change", [{"arch": "parallel_densenet121"}, {"stem": "small"}, {"norm": "shared"}]
)
def test_a_network_that_the_original_does_not_have_is_not_exported(change):
    ours = from_original(_file("parallel_resnet18"), sizes=SIZES)
    changed = dataclasses.replace(ours.network, **change)
    with pytest.raises(UsageError, match="the original has no"):
        to_original(dataclasses.replace(ours, network=changed))


class _Malicious:
    def __reduce__(self):
        return print, ("pwned",)


def test_nothing_in_an_originals_file_is_executed(tmp_path, capsys):
    torch.save(_file("parallel_resnet18") | {"args": _Malicious()}, tmp_path / "model.pth.tar")
    with pytest.raises(DataError, match=r"model\.pth\.tar is no readable checkpoint"):
        checkpoint.load(tmp_path / "model.pth.tar", sizes=SIZES)
    assert "pwned" not in capsys.readouterr().out


def test_what_lies_among_the_weights_is_left_out():
    content = _file("parallel_resnet18")
    content["state_dict"] |= {7: torch.zeros(1), "note": "trained in May"}
    for epoch in (None, "ten", -3):
        assert from_original(content | {"epoch": epoch}, sizes=SIZES).epoch == 0
    content["state_dict"]["module.fc.module.weight"] = torch.zeros(())
    with pytest.raises(DataError, match="there is no classifier"):
        from_original(content, sizes=SIZES)


def test_a_weight_decay_of_0_is_taken_along_both_ways():
    network = ModelConfig("parallel_resnet18", 2, (32,))
    model = create_model(network)
    group = {"params": [0], "weight_decay": 0.0}
    imported = Checkpoint(
        network, model.state_dict(), optimizer={"state": {}, "param_groups": [group]}
    )
    assert weight_decay(imported) == 0.0
    written = to_original(imported)["optimizer"]["param_groups"][0]
    assert written["weight_decay"] == 0.0


def test_batchnorm_weights_that_are_no_tensors_are_one_line():
    content = {"arch": "parallel_resnet18", "state_dict": {"bn1.bn_0.weight": [1.0]}}
    with pytest.raises(DataError, match="it has no BatchNorm weights that are tensors"):
        from_original(content)

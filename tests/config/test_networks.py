"""What `rsnet list` says of the networks, compared with what torchvision says of its weights."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from torchvision.models import get_model_weights

from pipelines.utils.errors import UsageError
from rsnet.__main__ import main
from rsnet.config.model_config import ModelConfig
from rsnet.config.networks import matching, torchvision_networks
from rsnet.config.train_config import TrainConfig
from rsnet.models.factory import library_name, list_models
from rsnet.models.measured import measure

NETWORKS = {network.name: network for network in torchvision_networks()}


def test_it_has_all_networks_and_no_other():
    assert list(NETWORKS) == list_models()


def test_parameters_and_costs_are_those_that_torchvision_gives_for_its_weights():
    compared = 0
    for name, network in NETWORKS.items():
        if not network.weights:
            continue
        weights = get_model_weights(library_name(name)[1])
        assert network.weights == tuple(one.name for one in weights), name
        for one in weights:
            # With auxiliary classifiers, which are left out here.
            if name not in ("parallel_googlenet", "parallel_inception_v3"):
                assert network.parameters == one.meta["num_params"], name
            if one.transforms.keywords["crop_size"] == 224:
                assert network.gmacs == pytest.approx(one.meta["_ops"], rel=0.02, abs=0.002), name
                compared += 1
    assert compared > 40


def test_a_network_is_measured_as_it_is_noted():
    for name in ("parallel_resnet10", "parallel_mobilenetv2"):
        assert measure(name) == NETWORKS[name]
    assert measure("parallel_resnet10").weights == ()


@pytest.mark.slow
def test_all_networks_are_measured_as_they_are_noted():
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "networks.py"))
    assert [dict(row) for row in script["table"]().values()] == [
        {"parameters": n.parameters, "gmacs": n.gmacs, "weights": n.weights}
        for n in NETWORKS.values()
    ]


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("parallel_mobilenet_v2", "parallel_mobilenetv2"),
        ("mobilenet_v2", "parallel_mobilenetv2"),
        ("mobilenetv2", "parallel_mobilenetv2"),
        ("parallel_mobilenetv2", "parallel_mobilenetv2"),
        ("resnet50", "parallel_resnet50"),
        ("timm/resnet18d", "parallel_timm/resnet18d"),
    ],
)
def test_every_spelling_of_a_network_is_recorded_as_one(name, recorded):
    assert TrainConfig(data=Path("x"), arch=name).arch == recorded
    assert ModelConfig(name, 3, (32,)).arch == recorded


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("mobilenet", ["mobilenet_v3_large", "mobilenet_v3_small", "mobilenetv2"]),
        ("mobilenet_v2", ["mobilenetv2"]),
        ("parallel_mobilenet_v2", ["mobilenetv2"]),
        ("ResNet5?", ["resnet50"]),
        ("*densenet2*", ["densenet201"]),
    ],
)
def test_a_pattern_fits_names_in_either_spelling(pattern, found):
    assert matching(NETWORKS, [pattern]) == [f"parallel_{name}" for name in found]


def test_what_fits_nothing_names_what_is_near():
    with pytest.raises(UsageError, match="resnet51: there is no such network; did you mean resnet"):
        matching(NETWORKS, ["resnet51"])


def test_the_table_and_json_say_the_same(capsys):
    assert main(["list", "resnet50", "resnet10"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "parameters,", "M", "GMACs", "weights"]
    assert [row.split() for row in rows if row.startswith("parallel_resnet")] == [
        ["parallel_resnet10", "5.4", "0.89", "none"],
        ["parallel_resnet101", "44.5", "7.80", "IMAGENET1K_V1", "IMAGENET1K_V2"],
        ["parallel_resnet50", "25.6", "4.09", "IMAGENET1K_V1", "IMAGENET1K_V2"],
    ]
    assert main(["list", "resnet10", "--json"]) == 0
    first, *_ = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"name": "parallel_resnet10", **vars(NETWORKS["parallel_resnet10"])} | {
        "weights": []
    }


def test_timms_networks_are_measured_and_those_without_batchnorm_left_out(capsys):
    timm = pytest.importorskip("timm")
    assert main(["list", "timm/resnet18d", "timm/vit_tiny_patch16_224"]) == 0
    _, row = capsys.readouterr().out.splitlines()
    name, parameters, gmacs, *weights = row.split()
    assert (name, parameters) == ("parallel_timm/resnet18d", "11.7")
    assert float(gmacs) == pytest.approx(2.06, abs=0.02)  # timm's results table
    assert weights == [tag.partition(".")[2] for tag in timm.list_pretrained("resnet18d.*")]

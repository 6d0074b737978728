"""A release's README.md: its metadata, its figures, its code."""

from __future__ import annotations

import re

import pytest
import yaml

from rsnet.release import model_card
from tests.helpers.runs import (
    read_config,
)


def test_the_card_has_the_hubs_metadata(folder):
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(front)
    (model,) = found.pop("model-index")
    assert found == {
        "license": "mit",
        "library_name": "rsnet",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "pytorch", "resolution-switchable"],
        "metrics": ["accuracy"],
    }
    assert model["name"] == "parallel_resnet10"
    (result,) = model["results"]
    assert result["task"] == {"type": "image-classification"}
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert len(values) == 2 * 4
    assert values["top-1 % at 64 pixels"] == 20.0
    assert values["top-5 % at 32 pixels"] == 54.0
    assert values["top-1 % of the ensemble"] == 23.0
    hub = pytest.importorskip("huggingface_hub", reason="comes with timm, which is an extra")
    card = hub.ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert len(card.data.eval_results) == 2 * 4


def test_the_card_says_what_the_network_is_worth_and_needs(folder):
    card, gmacs = (folder / "README.md").read_text(), read_config(folder)["gmacs"]
    assert f"| 64 | 20.00 | 52.00 | {gmacs['64']:.3f} |" in card
    assert f"| ensemble | 23.00 | 55.00 | {gmacs['ensemble']:.3f} |" in card
    assert "(64: 73, 48: 54, 32: 36)" in card
    assert "private to one of them: its\nBatchNorm, and its weight in the ensemble." in card
    assert "[0.485, 0.456, 0.406]" in card
    assert "arXiv:2007.09558" in card


def test_the_cards_code_runs(folder, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    monkeypatch.chdir(folder)
    scope: dict = {}
    exec(code, scope)
    assert scope["logits"].shape == (1, 3)


def test_a_card_without_accuracies_has_no_model_index(folder):
    config = read_config(folder) | {"accuracy": None}
    _, front, _ = model_card.text(config).split("---\n", 2)
    assert "model-index" not in yaml.safe_load(front)


def test_a_cards_section_is_replaced_and_the_rest_stays(folder):
    card = (folder / "README.md").read_text()
    once = model_card.with_bench(card, "first")
    assert once.startswith(card.rstrip("\n"))
    assert model_card.with_bench(once, "second") == once.replace("first", "second")
    edited = f"mine\r\n{once}more of mine\n"
    assert model_card.with_bench(edited, "second") == edited.replace("first", "second")

"""A release's README.md: what the network is, its accuracies, how to use it; with Hugging Face's metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipelines.utils.atomic_io import atomic_write
from pipelines.utils.errors import DataError, UsageError, error_context

NAME = "README.md"

_CARD = """\
---
license: mit  # of the trainer; change it if your data or weights ask for another
library_name: rsnet
pipeline_tag: image-classification
tags:
- image-classification
- pytorch
- resolution-switchable
metrics:
- accuracy
{model_index}---

# {arch} for {sizes} pixels

A Resolution Switchable Network: one CNN that classifies images into {num_classes:,} classes at any of these
resolutions, chosen at run time. They share {shared:,} parameters; {private:,} are private to one of them: its
{what_is_private}.

{table}

{note}

## Usage

With the RS-Net trainer installed (in a checkout of it: `pip install .`):

```python
import rsnet
import torch

model = rsnet.load(".")  # this folder
images = torch.zeros(1, 3, {smallest}, {smallest})  # (N, 3, s, s), s any of {sizes}
with torch.inference_mode():
    logits = model(images)  # (N, {num_classes})
```

`config.json` names the classes in the order of the logits. Nothing in the folder is executed.

## Preprocessing

For a size s: resize the RGB image with the filter "{interpolation}" so that its short side is
int(s / {crop_ratio}) pixels ({short_sides}); take the s x s pixels in the middle; divide by 255, subtract
{mean} and divide by {std}, channel by channel.

## Reference

Wang, Sun, Li and Yao: Resolution Switchable Networks for Runtime Efficient Image Recognition. ECCV 2020.
[arXiv:2007.09558](https://arxiv.org/abs/2007.09558)
"""

_DATASET = "validation images of the training run"

# Around the section that bench writes.
_BEGIN, _END = "<!-- bench -->", "<!-- end of bench -->"


def text(config: Mapping[str, Any]) -> str:
    """Return the card of a release. config: the content of its config.json."""
    network, preprocessing = config["network"], config["preprocessing"]
    return _CARD.format(
        model_index=_model_index(config),
        arch=network["arch"],
        sizes=", ".join(map(str, network["sizes"])),
        smallest=network["sizes"][-1],
        num_classes=network["num_classes"],
        **config["parameters"],
        what_is_private=_what_is_private(network["norm"]),
        table=_table(config),
        note=_note(config["accuracy"] is not None, network.get("calibrated", {})),
        crop_ratio=preprocessing["crop_ratio"],
        short_sides=", ".join(f"{s}: {side}" for s, side in preprocessing["short_sides"].items()),
        interpolation=preprocessing["interpolation"],
        mean=preprocessing["mean"],
        std=preprocessing["std"],
    )


def for_hub(card: bytes, name: str) -> bytes:
    """Return a card whose example loads the release from the hub, where it is `name`."""
    return card.replace(
        b'rsnet.load(".")  # this folder', f'rsnet.load("hf://{name}")'.encode()
    ).replace(b"`pip install .`", b'`pip install ".[hub]"`')


def with_bench(card: str, section: str) -> str:
    """Return a card with this section, in place of that of an earlier bench or at the end.

    Raises DataError if the markers around the section are not one pair.
    """
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if [card.count(_BEGIN), card.count(_END)] != ([1, 1] if begin and end else [0, 0]):
        raise DataError(f"the section between {_BEGIN} and {_END} is damaged; remove it")
    if not begin:
        before, after = card.rstrip("\n") + "\n\n", "\n"
    return f"{before}{_BEGIN}\n{section}\n{_END}{after}"


def _model_index(config: Mapping[str, Any]) -> str:
    """Return the accuracies, in %, as Hugging Face's `model-index`; nothing if they are not known."""
    if config["accuracy"] is None:
        return ""
    lines = [
        "model-index:",
        f"- name: {json.dumps(config['network']['arch'])}",  # a string of JSON is one of YAML
        "  results:",
        "  - task:",
        "      type: image-classification",
        "    dataset:",
        f"      name: {_DATASET}",
        "      type: imagefolder",
        "    metrics:",
    ]
    for name, result in config["accuracy"].items():
        where = f"at {name} pixels" if name.isdigit() else f"of the {name}"
        for key, label in (("top1", "top-1"), ("top5", "top-5")):
            lines += [
                "    - type: accuracy",
                f"      name: {label} % {where}",
                f"      value: {result[key]:.2f}",
            ]
    return "\n".join(lines) + "\n"


def update_bench(folder: str | Path, section: str | None) -> None:
    """Put a section of figures into the card of the release in `folder`; None only checks that it can.

    Raises UsageError if there is no card, or it cannot be written; DataError if it is damaged.
    """
    card = Path(folder) / NAME
    if not card.is_file() or not os.access(card.parent, os.W_OK):
        raise UsageError(f"--card: there is no {card} that can be written")
    try:
        with error_context(str(card)):
            text = with_bench(card.read_bytes().decode(), section or "")
    except UnicodeDecodeError as error:
        raise DataError(f"{card} is no UTF-8") from error
    if section is not None:
        atomic_write(card, text.encode(errors="backslashreplace"))


def _what_is_private(norm: str) -> str:
    weight = "weight in the ensemble"
    return weight if norm == "shared" else f"BatchNorm, and its {weight}"


def _table(config: Mapping[str, Any]) -> str:
    lines = ["| size | top-1 % | top-5 % | GMACs |", "|---|---|---|---|"]
    for name, gmacs in config["gmacs"].items():
        result = (config["accuracy"] or {}).get(name)
        top1, top5 = (f"{result[k]:.2f}" if result else "" for k in ("top1", "top5"))
        lines.append(f"| {name} | {top1} | {top5} | {gmacs:.3f} |")
    return "\n".join(lines)


def _note(is_evaluated: bool, added: Collection[str]) -> str:
    cost = "GMACs (10^9 multiply-accumulates) are an image's; the ensemble needs all sizes."
    if added:
        cost += f" Added after the training, without weight in the ensemble: {', '.join(added)}."
    how = f"Accuracies are of the {_DATASET}, one centre crop each."
    return f"{how} {cost}" if is_evaluated else f"Its accuracies are not known. {cost}"
